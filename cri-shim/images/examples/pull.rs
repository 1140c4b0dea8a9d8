//! Measures a pull without rrun-cri. Pulls one image into a directory, and prints the image's size
//! and the time of the pull.
//!
//!     pull DIRECTORY REFERENCE

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use rrun_images::{ImageSettings, Images, Registries};
use rrun_store::Store;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, reference] = arguments.as_slice() else {
        return Err("usage: pull DIRECTORY REFERENCE".into());
    };
    let dir = PathBuf::from(dir);
    std::fs::create_dir_all(&dir)?;
    let store = Store::open(&dir.join("meta.redb"))?;
    let registries = Registries::new(&dir.join("certs.d"));
    let images = Images::open(&dir, store, registries, ImageSettings::default())?;
    let begun = Instant::now();
    let image = images.pull(reference, None).await?;
    let wall = begun.elapsed();
    let disk = images.fs_usage()?;
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1_000_000.0;
    println!(
        "{} layers, {} bytes compressed, {} bytes and {} inodes unpacked",
        image.layers.len(),
        image.size,
        disk.bytes,
        disk.inodes
    );
    println!(
        "wall {:.2} s, user {:.2} s, system {:.2} s, peak RSS {:.1} MB",
        wall.as_secs_f64(),
        seconds(usage.user_time()),
        seconds(usage.system_time()),
        usage.max_rss() as f64 / 1024.0
    );
    Ok(())
}
