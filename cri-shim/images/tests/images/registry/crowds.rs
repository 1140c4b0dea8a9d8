//! Tests of pulls beside many hostile pulls. The hostile registries have the same address, and each
//! of them has another port.

use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::json;
use tokio::task::JoinHandle;

use super::simple;
use rrun_images::ImageSettings;

use crate::build::{Archive, Compression, Failure, Image, bombs, image};
use crate::node::Node;
use crate::server::{Answer, Request, Server};
use crate::trial;

/// The hostile pulls need hours.
const DEADLINE: Duration = Duration::from_secs(100);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_small_image_is_pulled_beside_slow_layers_from_many_ports",
            slow_layers,
        ),
        trial(
            "a_small_image_is_pulled_beside_slow_layers_from_many_redirections",
            slow_redirections,
        ),
        trial(
            "a_small_image_is_pulled_beside_layers_from_many_ports_that_need_hours_to_be_unpacked",
            long_layers,
        ),
        trial(
            "a_layer_that_gives_up_its_place_for_other_layers_is_unpacked_later",
            preempted_layer,
        ),
    ]
}

/// Returns a handler that sends the first layer of `image` at 2.5 KB per second.
fn paced(image: &Image) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    let (layer, blob) = (image.layers[0].clone(), image.blobs[0].clone());
    move |request| {
        let mut answer = Answer::new(200, blob.clone()).ranged(request);
        (answer.piece, answer.slow) = (1000, Duration::from_millis(400));
        request.path.ends_with(&layer).then_some(answer)
    }
}

/// Returns an image with one layer. The layer of each `number` is different.
fn of_zeros(number: usize) -> Image {
    let layer = vec![0; (2 << 20) + number * 512];
    image(&[(layer, Compression::None)], json!({}))
}

/// Starts a pull of the image `name` from each server, and waits until the first servers have
/// received requests for layers.
async fn begin(node: &Node, servers: &[Server], name: &str) -> Vec<JoinHandle<()>> {
    let pull = |server: &Server| {
        let (images, reference) = (node.images.clone(), format!("{}/{name}:1", server.host()));
        tokio::spawn(async move {
            let _ = images.pull(&reference, None).await;
        })
    };
    let pulls = servers.iter().map(pull).collect();
    // A request for a configuration and a request for the layer.
    let begun = |server: &&Server| server.count("/blobs/") >= 2;
    while servers.iter().filter(begun).count() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    pulls
}

/// Pulls a small image from another registry during the hostile pulls.
async fn pulls_a_small_image(node: &Node, hostile: Vec<JoinHandle<()>>) -> Result<(), Failure> {
    let built = simple();
    let server = Server::start(&[("small", &built)], |_| None)?;
    let reference = format!("{}/small:1", server.host());
    let pulled = node.images.pull(&reference, None);
    tokio::time::timeout(DEADLINE, pulled).await??;
    assert!(
        hostile.iter().any(|pull| !pull.is_finished()),
        "the small image was pulled after all hostile pulls"
    );
    for pull in hostile {
        pull.abort();
    }
    Ok(())
}

async fn slow_layers() -> Result<(), Failure> {
    let mut servers = Vec::new();
    for number in 0..20 {
        let built = of_zeros(number);
        servers.push(Server::start(&[("slow", &built)], paced(&built))?);
    }
    let node = Node::new()?;
    let hostile = begin(&node, &servers, "slow").await;
    pulls_a_small_image(&node, hostile).await
}

/// The hostile registries redirect the requests for layers to other ports.
async fn slow_redirections() -> Result<(), Failure> {
    let mut servers = Vec::new();
    for number in 0..20 {
        let built = of_zeros(number);
        let elsewhere = Server::start(&[], paced(&built))?;
        let layer = built.layers[0].clone();
        let server = Server::start(&[("slow", &built)], move |request| {
            let to = format!("http://{}{}", elsewhere.host(), request.path);
            let answer = Answer::new(307, "").header("Location", to);
            request.path.ends_with(&layer).then_some(answer)
        })?;
        servers.push(server);
    }
    let node = Node::new()?;
    let hostile = begin(&node, &servers, "slow").await;
    pulls_a_small_image(&node, hostile).await
}

async fn long_layers() -> Result<(), Failure> {
    let mut servers = Vec::new();
    for number in 0..26 {
        let built = bombs(&format!("bomb-{number}"), 1);
        servers.push(Server::start(&[("long", &built)], |_| None)?);
    }
    let node = Node::new()?;
    let hostile = begin(&node, &servers, "long").await;
    pulls_a_small_image(&node, hostile).await
}

/// An ordinary layer has many files and few bytes, and the hostile layers need all places. The ordinary layer is unpacked nevertheless.
async fn preempted_layer() -> Result<(), Failure> {
    let mut servers = Vec::new();
    for number in 0..8 {
        let built = bombs(&format!("bomb-{number}"), 1);
        servers.push(Server::start(&[("long", &built)], |_| None)?);
    }
    let node = Node::with(ImageSettings {
        parallel_layers: 1,
        parallel_unpacks: 1,
        ..ImageSettings::default()
    })?;
    let files = (0..8000).fold(Archive::new(), |archive, number| {
        archive.file(&format!("file-{number}"), "")
    });
    let built = image(&[(files.end(), Compression::Gzip)], json!({}));
    let server = Server::start(&[("files", &built)], |_| None)?;
    let reference = format!("{}/files:1", server.host());
    let hostile = begin(&node, &servers, "long").await;
    let pulled = node.images.pull(&reference, None);
    tokio::time::timeout(DEADLINE, pulled).await??;
    assert!(hostile.iter().all(|pull| !pull.is_finished()));
    for pull in hostile {
        pull.abort();
    }
    Ok(())
}
