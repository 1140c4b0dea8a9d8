//! Registries that send a byte now and then: they hold up no other pull, and no pull for ever.

use std::fs;
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, Image, digest, image};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Request, Server};
use crate::support::machine::{Result, Running, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        layers_that_drip_hold_up_no_other_registry,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        layers_that_drip_give_way_to_their_own_registry,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_pull_that_nobody_waits_for_ends, A_NODE, Need::RrunCri),
    test!(a_retry_joins_the_pull, A_NODE, Need::RrunCri),
    test!(
        an_answer_below_the_least_rate_is_refused_with_its_numbers,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        after_a_mirror_that_drips_the_next_is_asked,
        A_NODE,
        Need::RrunCri
    ),
];

/// The pause after each byte of a slow answer.
const DRIP_INTERVAL: Duration = Duration::from_millis(500);

fn serve(
    images: &[(&str, &Image)],
    answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> Result<Server> {
    Server::start(images, answer).map_err(|error| error.to_string().into())
}

/// An image of `count` different layers.
fn of_layers(name: &str, count: usize) -> Image {
    let layers: Vec<_> = (0..count)
        .map(|n| {
            let archive = Archive::new().file(&format!("{name}-{n}"), "content");
            (archive.end(), Compression::Gzip)
        })
        .collect();
    image(&layers, json!({ "Labels": { "name": name } }))
}

/// Serves the layers of `image` a byte at a time.
fn dripping(image: &Image) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    let layers: Vec<(String, Vec<u8>)> = image
        .layers
        .iter()
        .cloned()
        .zip(image.blobs.iter().cloned())
        .collect();
    move |request| {
        let (_, blob) = layers
            .iter()
            .find(|(layer, _)| request.path.ends_with(layer.as_str()))?;
        Some(Answer::new(200, blob.clone()).dripping(DRIP_INTERVAL))
    }
}

fn configure(node: &mut Node, image: &str) -> Result {
    let drop_ins = node.join("config.d");
    fs::create_dir_all(&drop_ins)?;
    fs::write(drop_ins.join("pace.toml"), format!("[image]\n{image}"))?;
    node.terminate_server()?;
    node.start_server()
}

/// Waits until all these layers have been requested.
fn asked(server: &Server, image: &Image) -> Result {
    wait_for("the layers to be requested", || {
        let asked = |layer: &String| server.count(layer) > 0;
        Ok(image.layers.iter().all(asked).then_some(()))
    })
}

/// Restarts the server, which ends the pull, and checks that nothing of the pull is left.
fn ends(node: &mut Node, hanging: Running) -> Result {
    drop(hanging);
    node.terminate_server()?;
    node.start_server()?;
    is_clean(node)
}

/// Waits until neither layers nor partial blobs are left.
fn is_clean(node: &Node) -> Result {
    for (dir, most) in [("root/layers", 1), ("root/ingest", 0)] {
        wait_for(&format!("{dir} to be empty"), || {
            Ok((fs::read_dir(node.join(dir))?.count() <= most).then_some(()))
        })?;
    }
    Ok(())
}

fn layers_that_drip_hold_up_no_other_registry() -> Result {
    on_a_node(|node| {
        // The host gets three of the four slots, which is the most that one host may have.
        let drip = of_layers("drip", 3);
        let server = serve(&[("drip", &drip)], dripping(&drip))?;
        let hanging = node
            .crictl(&["pull", &format!("{}/drip:1", server.host())])
            .start()?;
        asked(&server, &drip)?;
        node.pull(BUSYBOX)?;
        node.asks(&["rmi", BUSYBOX])?;
        ends(node, hanging)
    })
}

fn layers_that_drip_give_way_to_their_own_registry() -> Result {
    on_a_node(|node| {
        let (drip, small) = (of_layers("drip", 3), of_layers("small", 2));
        let images = [("drip", &drip), ("small", &small)];
        let server = serve(&images, dripping(&drip))?;
        let host = server.host();
        let hanging = node.crictl(&["pull", &format!("{host}/drip:1")]).start()?;
        asked(&server, &drip)?;
        node.pull(&format!("{host}/small:1"))?;
        ensure!(
            node.log().contains("another image waits; it goes on later"),
            "the log does not report the turn that was given up"
        );
        node.asks(&["rmi", &format!("{host}/small:1")])?;
        ends(node, hanging)
    })
}

fn a_pull_that_nobody_waits_for_ends() -> Result {
    on_a_node(|node| {
        configure(node, "abandoned_seconds = 1\n")?;
        let drip = of_layers("drip", 2);
        let server = serve(&[("drip", &drip)], dripping(&drip))?;
        let name = format!("{}/drip:1", server.host());
        for round in 1..=2 {
            let hanging = node.crictl(&["pull", &name]).start()?;
            wait_for("the layers to be requested", || {
                let asked = |layer: &String| server.count(layer) == round;
                Ok(drip.layers.iter().all(asked).then_some(()))
            })?;
            drop(hanging);
            wait_for("the pull to end", || {
                let told = "nobody has waited for it for 1 s";
                Ok((node.log().matches(told).count() == round).then_some(()))
            })?;
            is_clean(node)?;
        }
        Ok(())
    })
}

fn a_retry_joins_the_pull() -> Result {
    on_a_node(|node| {
        let drip = of_layers("drip", 1);
        let mut whole = Answer::new(200, drip.blobs[0].clone());
        // The answer takes about 3 s in all.
        whole.piece = drip.blobs[0].len() / 6 + 1;
        whole.slow = DRIP_INTERVAL;
        let (layer, piece) = (drip.layers[0].clone(), whole.piece);
        let server = serve(&[("drip", &drip)], move |request| {
            let mut answer = Answer::new(200, whole.body.clone());
            (answer.slow, answer.piece) = (DRIP_INTERVAL, piece);
            request.path.ends_with(&layer).then_some(answer)
        })?;
        let name = format!("{}/drip:1", server.host());
        let first = node.crictl(&["pull", &name]).start()?;
        asked(&server, &drip)?;
        drop(first);
        node.pull(&name)?;
        ensure_eq!(server.count(&drip.layers[0]), 1, "how often it was fetched");
        ensure!(
            !node.log().contains("nobody has waited"),
            "the pull was given up"
        );
        Ok(())
    })
}

/// In each case one answer comes a byte at a time: one of an image's, or the token server's.
fn an_answer_below_the_least_rate_is_refused_with_its_numbers() -> Result {
    on_a_node(|node| {
        configure(node, "least_rate = 50\nleast_rate_seconds = 2\n")?;
        let calls = Calls::new(node)?;
        let built = of_layers("drip", 1);
        let [layer, config, manifest] = [0, 1, 2].map(|at| built.blobs[at].clone());
        let slow = |body: &[u8]| Answer::new(200, body).dripping(DRIP_INTERVAL);
        let elsewhere = {
            let layer = layer.clone();
            serve(&[], move |_| Some(slow(&layer)))?
        };
        let (sent_to, drips) = (elsewhere.host(), elsewhere.host());
        let id = built.id.clone();
        let layer_name = built.layers[0].clone();
        let images = ["manifest", "config", "layer", "moved", "token"].map(|name| (name, &built));
        let server = serve(&images, move |request| {
            let repository = request.path.split('/').nth(2)?;
            let is = |what: &str| {
                request
                    .path
                    .split('?')
                    .next()
                    .is_some_and(|p| p.ends_with(what))
            };
            match repository {
                "manifest" if request.path.contains("/manifests/") => Some(slow(&manifest)),
                "config" if is(&id) => Some(slow(&config)),
                "layer" if is(&layer_name) => Some(slow(&layer)),
                "moved" if is(&layer_name) => {
                    Some(Answer::new(307, "").header("Location", format!("http://{sent_to}/there")))
                }
                "token" => {
                    let asks = format!("Bearer realm=\"http://{sent_to}/token\"");
                    Some(Answer::new(401, "").header("WWW-Authenticate", asks))
                }
                _ => None,
            }
        })?;
        for (name, words) in [
            ("manifest", vec![server.host()]),
            ("config", vec![server.host()]),
            ("layer", vec![server.host(), built.layers[0].clone()]),
            ("moved", vec![drips, built.layers[0].clone()]),
            ("token", vec![server.host(), "token server".to_owned()]),
        ] {
            let reference = format!("{}/{name}:1", server.host());
            let status = pull(&calls, &reference, None)?
                .err()
                .ok_or_else(|| format!("{name} was pulled"))?;
            ensure_eq!(status.code(), Code::Unavailable, "{name}: {status:?}");
            let told = status.message();
            let all = ["image.least_rate wants 50 bytes a second", " s, where"];
            ensure!(
                all.iter().all(|words| told.contains(words))
                    && words.iter().all(|words| told.contains(words.as_str())),
                "{name}: {told:?} lacks one of {words:?}"
            );
        }
        ensure_eq!(fs::read_dir(node.join("root/ingest"))?.count(), 0, "ingest");
        Ok(())
    })
}

/// The mirror sends its layers a byte at a time, and then its manifests, too.
fn after_a_mirror_that_drips_the_next_is_asked() -> Result {
    on_a_node(|node| {
        configure(node, "least_rate = 50\nleast_rate_seconds = 2\n")?;
        let built = of_layers("app", 2);
        let good = serve(&[("app", &built)], |_| None)?;
        for what in ["/blobs/", "/manifests/"] {
            let whole = built.blobs.clone();
            let mirror = serve(&[("app", &built)], move |request| {
                let path = request.path.split('?').next()?.to_owned();
                let target = path.rsplit('/').next()?;
                let blob = whole
                    .iter()
                    .find(|blob| digest(blob) == target)
                    .or(whole.last())?;
                path.contains(what)
                    .then(|| Answer::new(200, blob.clone()).dripping(DRIP_INTERVAL))
            })?;
            let dir = node.join("certs.d").join("mirrored.example");
            fs::create_dir_all(&dir)?;
            fs::write(
                dir.join("hosts.toml"),
                format!(
                    "server = \"http://{}\"\n[host.\"http://{}\"]\n\
                     capabilities = [\"pull\", \"resolve\"]\n",
                    good.host(),
                    mirror.host()
                ),
            )?;
            node.pull("mirrored.example/app:1")?;
            ensure!(mirror.count(what) > 0, "the mirror was not asked");
            node.asks(&["rmi", "mirrored.example/app:1"])?;
        }
        Ok(())
    })
}
