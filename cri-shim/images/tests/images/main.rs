//! Tests of pulls from a real registry and from test servers that send wrong data.

mod build;
mod credentials;
mod directory_layers;
mod layers;
mod node;
mod pulls;
mod registry;
mod server;

use std::future::Future;

use libtest_mimic::{Arguments, Trial};

use build::Failure;

/// Creates a test that runs on its own small tokio runtime.
fn trial<F>(name: &'static str, test: fn() -> F) -> Trial
where
    F: Future<Output = Result<(), Failure>> + 'static,
{
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime
            .block_on(test())
            .map_err(|error| error.to_string().into())
    })
}

/// If `missing` contains a reason, reports the test as skipped with this reason. If `missing` is
/// `None`, returns the test unchanged.
fn unless(missing: Option<&str>, trial: Trial) -> Trial {
    match missing {
        Some(reason) => {
            eprintln!("skipped: {}: {reason}", trial.name());
            trial.with_ignored_flag(true)
        }
        None => trial,
    }
}

fn main() {
    registry::be_the_child();
    let arguments = Arguments::from_args();
    let root = rustix::process::geteuid().is_root();
    let not_root = (!root)
        .then_some("this test needs root to set owners, create devices and mount file systems");
    let no_registry = node::missing(&["docker-registry", "skopeo"]);
    let no_registry = not_root.or(no_registry.as_deref());
    let no_openssl = node::missing(&["openssl"]);
    let no_openssl = no_registry.or(no_openssl.as_deref());
    let no_tar = node::no_gnu_tar();
    let no_tar = not_root.or(no_tar.as_deref());
    let without_programs = layers::trials()
        .into_iter()
        .chain(registry::trials())
        .chain(directory_layers::trials())
        .chain(credentials::trials());
    let pulls = pulls::trials().into_iter();
    let trials = without_programs
        .map(|trial| unless(not_root, trial))
        .chain(pulls.map(|trial| unless(no_registry, trial)))
        .chain(
            layers::trials_of_gnu_tar()
                .into_iter()
                .map(|trial| unless(no_tar, trial)),
        )
        .chain(
            pulls::trials_of_tls()
                .into_iter()
                .map(|trial| unless(no_openssl, trial)),
        )
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
