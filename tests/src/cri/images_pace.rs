//! Tests with registries that send only one byte from time to time. A slow registry delays no other
//! pull, and no pull waits forever for a slow registry.

use std::fs;
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use crate::support::calls::Calls;
use crate::support::images::build::{Archive, Compression, Image, bombs, digest, image};
use crate::support::images::pull;
use crate::support::images::server::{Answer, Request, Server};
use crate::support::machine::{Result, Running, wait_for};
use crate::support::needs::{Need, Test};
use crate::support::node::{A_NODE, BUSYBOX, Node, on_a_node};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        slow_layers_delay_no_pull_from_another_registry,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        steady_layers_from_two_registries_delay_no_pull_from_a_third,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_slow_pull_gives_up_a_download_slot_to_another_pull_from_the_same_registry,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_slow_registry_delays_no_pull_of_the_same_layer_from_another_registry,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_layer_that_waits_behind_other_layers_of_its_image_delays_no_other_pull,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        layers_that_need_hours_to_be_unpacked_delay_no_other_pull,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pull_ends_when_no_caller_waits_for_it,
        A_NODE,
        Need::RrunCri
    ),
    test!(a_retry_joins_the_pull_in_progress, A_NODE, Need::RrunCri),
    test!(
        a_pull_below_the_minimum_rate_fails_and_the_error_names_the_measured_rate,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        response_heads_without_end_delay_no_other_call,
        A_NODE,
        Need::RrunCri
    ),
    test!(
        a_pull_skips_a_slow_mirror_and_uses_the_next_host,
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

/// Returns an image with `count` different layers.
fn of_layers(name: &str, count: usize) -> Image {
    let layers: Vec<_> = (0..count)
        .map(|n| {
            let archive = Archive::new().file(&format!("{name}-{n}"), "content");
            (archive.end(), Compression::Gzip)
        })
        .collect();
    image(&layers, json!({ "Labels": { "name": name } }))
}

/// Returns a handler that sends the layers of `image` one byte at a time.
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

/// Returns an image with `count` empty layers of 3 MiB.
fn of_zeros(name: &str, count: usize) -> Image {
    let layers: Vec<_> = (1..=count)
        .map(|number| (vec![0; (3 << 20) + number * 512], Compression::None))
        .collect();
    image(&layers, json!({ "Labels": { "name": name } }))
}

/// Returns a handler that sends the layers of `image` without a long pause. Each layer needs 20 s.
fn paced(image: &Image) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    let send = dripping(image);
    move |request| {
        let mut answer = send(request)?;
        (answer.piece, answer.slow) = (16 << 10, Duration::from_millis(110));
        Some(answer)
    }
}

fn configure(node: &mut Node, image: &str) -> Result {
    let drop_ins = node.join("config.d");
    fs::create_dir_all(&drop_ins)?;
    fs::write(drop_ins.join("pace.toml"), format!("[image]\n{image}"))?;
    node.terminate_server()?;
    node.start_server()
}

/// Waits until the registry `server` has received requests for all layers of `image`.
fn requested(server: &Server, image: &Image) -> Result {
    wait_for(
        "the registry to receive requests for all layers of the image",
        || {
            let requested = |layer: &String| server.count(layer) > 0;
            Ok(image.layers.iter().all(requested).then_some(()))
        },
    )
}

/// Kills the client `hanging` and restarts the server. The restart ends the client's pull. The
/// function then waits until no files of the pull are left.
fn ends(node: &mut Node, hanging: Running) -> Result {
    drop(hanging);
    node.terminate_server()?;
    node.start_server()?;
    is_clean(node)
}

/// Waits until no layer (except the empty layer) and no partial download is left.
fn is_clean(node: &Node) -> Result {
    for (dir, most) in [("root/layers", 1), ("root/ingest", 0)] {
        wait_for(
            &format!("the server's directory {dir} to have at most {most} entries"),
            || Ok((fs::read_dir(node.join(dir))?.count() <= most).then_some(())),
        )?;
    }
    Ok(())
}

fn slow_layers_delay_no_pull_from_another_registry() -> Result {
    on_a_node(|node| {
        // By default, the server fetches at most four layers at the same time, and at most three
        // from one host. So the pull from the other registry can still fetch one layer at a time.
        let drip = of_layers("drip", 3);
        let server = serve(&[("drip", &drip)], dripping(&drip))?;
        let hanging = node
            .crictl(&["pull", &format!("{}/drip:1", server.host())])
            .start()?;
        requested(&server, &drip)?;
        node.pull(BUSYBOX)?;
        node.asks(&["rmi", BUSYBOX])?;
        ends(node, hanging)
    })
}

fn steady_layers_from_two_registries_delay_no_pull_from_a_third() -> Result {
    on_a_node(|node| {
        // Together, the two registries occupy all four normal download slots.
        let (first, second) = (of_zeros("first", 3), of_zeros("second", 1));
        let servers = [
            serve(&[("app", &first)], paced(&first))?,
            serve(&[("app", &second)], paced(&second))?,
        ];
        let names = servers.each_ref().map(|it| format!("{}/app:1", it.host()));
        let other = node.crictl(&["pull", &names[0]]).start()?;
        requested(&servers[0], &first)?;
        let hanging = node.crictl(&["pull", &names[1]]).start()?;
        requested(&servers[1], &second)?;
        node.pull(BUSYBOX)?;
        for name in &names {
            ensure!(
                !node.log().contains(&format!("pull {name}: done")),
                "the pull of {BUSYBOX} waited until the pull of {name} was complete"
            );
        }
        node.asks(&["rmi", BUSYBOX])?;
        drop(other);
        ends(node, hanging)
    })
}

fn a_slow_pull_gives_up_a_download_slot_to_another_pull_from_the_same_registry() -> Result {
    on_a_node(|node| {
        let (drip, small) = (of_layers("drip", 3), of_layers("small", 2));
        let images = [("drip", &drip), ("small", &small)];
        let server = serve(&images, dripping(&drip))?;
        let host = server.host();
        let hanging = node.crictl(&["pull", &format!("{host}/drip:1")]).start()?;
        requested(&server, &drip)?;
        node.pull(&format!("{host}/small:1"))?;
        ensure!(
            node.log().contains(
                "another image waits for the layer's download slot; the fetch continues later"
            ),
            "the server's log does not report that the slow download gave up its slot to the pull of another image"
        );
        node.asks(&["rmi", &format!("{host}/small:1")])?;
        ends(node, hanging)
    })
}

/// Two registries provide the same layer, and one of them sends one byte at a time.
fn a_slow_registry_delays_no_pull_of_the_same_layer_from_another_registry() -> Result {
    on_a_node(|node| {
        configure(node, "least_rate = 0\njoin_rate = 0\n")?;
        let built = of_layers("same", 1);
        let slow = serve(&[("slow", &built)], dripping(&built))?;
        let fast = serve(&[("fast", &built)], |_| None)?;
        let hanging = node
            .crictl(&["pull", &format!("{}/slow:1", slow.host())])
            .start()?;
        requested(&slow, &built)?;
        let name = format!("{}/fast:1", fast.host());
        node.pull(&name)?;
        // The slow pull needs no more bytes, because the layer is now on the node.
        let ended = hanging.end()?;
        ensure_eq!(
            ended.code,
            0,
            "exit code of the slow pull: {}",
            ended.stderr
        );
        ensure_eq!(fast.count(&built.layers[0]), 1, "number of downloads");
        node.asks(&["rmi", &name])?;
        is_clean(node)
    })
}

/// An image names another image's layer behind its own layers, which arrive one byte at a time. The
/// fetch of the named layer therefore gets no slot.
fn a_layer_that_waits_behind_other_layers_of_its_image_delays_no_other_pull() -> Result {
    on_a_node(|node| {
        configure(node, "least_rate = 0\n")?;
        let hostile = of_layers("layer", 4);
        let archive = Archive::new().file("layer-3", "content");
        let victim = image(&[(archive.end(), Compression::Gzip)], json!({}));
        ensure_eq!(
            victim.layers[0],
            hostile.layers[3],
            "digest of the shared layer"
        );
        let slow: Vec<String> = hostile.layers[..3].to_vec();
        let drips = dripping(&hostile);
        let images = [("hostile", &hostile), ("victim", &victim)];
        let server = serve(&images, move |request| {
            let is_slow = slow.iter().any(|layer| request.path.ends_with(layer));
            is_slow.then(|| drips(request)).flatten()
        })?;
        let host = server.host();
        let hanging = node
            .crictl(&["pull", &format!("{host}/hostile:1")])
            .start()?;
        wait_for(
            "the registry to receive requests for the first layers",
            || {
                let sent = |layer: &String| server.count(layer) > 0;
                Ok(hostile.layers[..3].iter().all(sent).then_some(()))
            },
        )?;
        node.pull(&format!("{host}/victim:1"))?;
        node.asks(&["rmi", &format!("{host}/victim:1")])?;
        ends(node, hanging)
    })
}

/// The layers of two hostile images need all places of partly unpacked layers, and the images'
/// further layers need all slots. A pull nevertheless gets slots, places and turns.
fn layers_that_need_hours_to_be_unpacked_delay_no_other_pull() -> Result {
    on_a_node(|node| {
        let mut hanging = Vec::new();
        for name in ["first", "second"] {
            let built = bombs(name, 9);
            let server = serve(&[(name, &built)], |_| None)?;
            let pull = format!("{}/{name}:1", server.host());
            hanging.push(node.crictl(&["pull", &pull]).start()?);
            wait_for("the registry to send layers of the hostile image", || {
                let sent = |layer: &&String| server.count(layer) > 0;
                Ok((built.layers.iter().filter(sent).count() >= 1).then_some(()))
            })?;
        }
        node.pull(BUSYBOX)?;
        let small = of_layers("small", 5);
        let server = serve(&[("small", &small)], |_| None)?;
        node.pull(&format!("{}/small:1", server.host()))?;
        for pull in &mut hanging {
            ensure!(
                pull.lives(),
                "the pull of a hostile image ended before the pulls of the other images"
            );
        }
        node.terminate_server()?;
        drop(hanging);
        Ok(())
    })
}

fn a_pull_ends_when_no_caller_waits_for_it() -> Result {
    on_a_node(|node| {
        configure(node, "abandoned_seconds = 1\n")?;
        let drip = of_layers("drip", 2);
        let server = serve(&[("drip", &drip)], dripping(&drip))?;
        let name = format!("{}/drip:1", server.host());
        for round in 1..=2 {
            let hanging = node.crictl(&["pull", &name]).start()?;
            wait_for(
                "the registry to receive requests for all layers of the image",
                || {
                    let requested = |layer: &String| server.count(layer) == round;
                    Ok(drip.layers.iter().all(requested).then_some(()))
                },
            )?;
            drop(hanging);
            wait_for("the server to end the pull", || {
                let line = "no caller has waited for this pull for 1 s";
                Ok((node.log().matches(line).count() == round).then_some(()))
            })?;
            is_clean(node)?;
        }
        Ok(())
    })
}

fn a_retry_joins_the_pull_in_progress() -> Result {
    on_a_node(|node| {
        let drip = of_layers("drip", 1);
        let mut whole = Answer::new(200, drip.blobs[0].clone());
        // The transfer of the layer takes about 3 s in total.
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
        requested(&server, &drip)?;
        drop(first);
        node.pull(&name)?;
        ensure_eq!(
            server.count(&drip.layers[0]),
            1,
            "number of downloads of the layer"
        );
        ensure!(
            !node.log().contains("no caller has waited"),
            "the server cancelled the pull before the retry joined the pull"
        );
        Ok(())
    })
}

/// Each pull gets one slow answer, which arrives one byte at a time. The slow answer is a manifest,
/// a configuration, a layer, or the answer of the token server.
fn a_pull_below_the_minimum_rate_fails_and_the_error_names_the_measured_rate() -> Result {
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
                    let challenge = format!("Bearer realm=\"http://{sent_to}/token\"");
                    Some(Answer::new(401, "").header("WWW-Authenticate", challenge))
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
                .ok_or_else(|| format!("the pull of the image {name} succeeded, but must fail"))?;
            ensure_eq!(
                status.code(),
                Code::Unavailable,
                "gRPC code of the failed pull of the image {name} (gRPC status: {status:?})"
            );
            let message = status.message();
            let all = ["image.least_rate requires 50 bytes a second", " s; image"];
            ensure!(
                all.iter().all(|words| message.contains(words))
                    && words.iter().all(|words| message.contains(words.as_str())),
                "the error message about the image {name} does not contain all texts of {all:?} and {words:?}: {message:?}"
            );
        }
        ensure_eq!(
            fs::read_dir(node.join("root/ingest"))?.count(),
            0,
            "number of partial downloads after the failed pulls"
        );
        Ok(())
    })
}

/// The registry answers the requests for all layers with informational heads without end. Three such
/// connections could occupy both threads of the server's runtime.
fn response_heads_without_end_delay_no_other_call() -> Result {
    on_a_node(|node| {
        configure(node, "silence_seconds = 3\n")?;
        let built = of_layers("heads", 3);
        let layers = built.layers.clone();
        let server = serve(&[("heads", &built)], move |request| {
            let mut answer = Answer::new(200, "");
            answer.endless_heads = true;
            let is_layer = layers.iter().any(|layer| request.path.ends_with(layer));
            is_layer.then_some(answer)
        })?;
        let reference = format!("{}/heads:1", server.host());
        let mut pull = node.crictl(&["pull", &reference]).start()?;
        requested(&server, &built)?;
        for _ in 0..3 {
            node.asks(&["version"])?;
        }
        ensure!(
            pull.lives(),
            "the pull ended before the calls, so the calls were not made during the attack"
        );
        pull.end()?.fails_with("no answer within 3 s")?;
        wait_for("the registry's connections to end", || {
            Ok((server.open() == 0).then_some(()))
        })?;
        let threads = format!("/proc/{}/task", node.server_pid()?);
        wait_for("the server's thread for the registry to end", || {
            for thread in fs::read_dir(&threads)? {
                if fs::read_to_string(thread?.path().join("comm"))? == "registry\n" {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        is_clean(node)
    })
}

/// In the first round, the mirror sends its layers one byte at a time. In the second round, the
/// mirror sends its manifests one byte at a time.
fn a_pull_skips_a_slow_mirror_and_uses_the_next_host() -> Result {
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
            ensure!(
                mirror.count(what) > 0,
                "the mirror received no request whose path contains {what}"
            );
            node.asks(&["rmi", "mirrored.example/app:1"])?;
        }
        Ok(())
    })
}
