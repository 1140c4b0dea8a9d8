//! Tests of pulls from docker-registry.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use libtest_mimic::Trial;
use rrun_images::Kind;
use serde_json::json;

use crate::build::{Archive, Compression, Failure, Image, image};
use crate::node::{Dir, Node, Registry};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "an_image_is_found_by_its_tag_its_digest_and_its_id_until_it_is_removed",
            found_and_removed,
        ),
        trial("layers_can_be_gzip_zstd_or_uncompressed", compressions),
        trial("an_image_of_dockers_schema_2_is_pulled", schema_2),
        trial("an_image_is_kept_over_a_restart", restart),
        trial("a_leased_layer_is_kept_when_its_image_is_removed", leased),
        trial(
            "simultaneous_calls_for_one_reference_share_one_pull",
            joined,
        ),
        trial("an_image_of_a_hundred_layers_is_pulled", hundred),
    ]
}

/// Returns the tests that need openssl to create certificates.
pub(crate) fn trials_of_tls() -> Vec<Trial> {
    vec![trial(
        "tls_certificates_are_verified_with_the_authority_in_hosts_toml",
        tls,
    )]
}

fn three_layers() -> Image {
    let layers = [
        Archive::new()
            .dir("etc/", 0o755)
            .file("etc/one", "1")
            .file("etc/two", "2"),
        Archive::new()
            .dir("etc/", 0o755)
            .file("etc/one", "uno")
            .file("etc/.wh.two", ""),
        Archive::new().dir("tmp/", 0o1777).file("three", "3"),
    ];
    let layers: Vec<_> = layers
        .into_iter()
        .zip([Compression::Gzip, Compression::Zstd, Compression::None])
        .map(|(archive, compression)| (archive.end(), compression))
        .collect();
    image(
        &layers,
        json!({"Entrypoint": ["/bin/app"], "Cmd": ["-x"], "Env": ["A=1"], "User": "7:8",
               "WorkingDir": "/etc", "Volumes": {"/data": {}}, "StopSignal": "SIGINT",
               "Labels": {"k": "v"}}),
    )
}

async fn found_and_removed() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let built = three_layers();
    let reference = registry.push(&built, "app:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let image = node.images.pull(&reference, None).await?;
    assert_eq!(image.id, built.id);
    assert_eq!(image.repo_tags, std::slice::from_ref(&reference));
    let by_digest = format!("{}/app@{}", registry.host(), built.manifest);
    assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    assert_eq!(image.config.entrypoint, ["/bin/app"]);
    assert_eq!(image.config.user, "7:8");
    assert_eq!(image.config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(image.config.volumes, ["/data"]);
    let size: usize = built.blobs.iter().map(Vec::len).sum();
    assert_eq!(image.size, size as u64);
    let short = &image.id["sha256:".len()..][..12];
    for name in [reference.as_str(), &by_digest, &image.id, short] {
        assert!(
            node.images.find(name).is_some(),
            "the image was not found under the name {name}"
        );
    }
    let again = node.images.pull(&by_digest, None).await?;
    assert_eq!(again.repo_tags, image.repo_tags);
    assert_eq!(node.images.list().len(), 1);
    let usage = node.images.fs_usage()?;
    assert!(usage.bytes > 0 && usage.inodes >= 8, "{usage:?}");

    node.images.remove(short).await?;
    node.images.remove(short).await?;
    assert!(node.images.list().is_empty());
    node.becomes_clean().await?;
    assert_eq!(node.images.fs_usage()?.inodes, 0);
    Ok(())
}

async fn compressions() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let built = three_layers();
    let reference = registry.push(&built, "mixed:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let image = node.images.pull(&reference, None).await?;
    assert_eq!(image.layers.len(), 3);
    let lowers = node.images.lease("c", &image.id).await?;
    let [top, middle, bottom] = lowers.as_slice() else {
        return Err(format!("the image must have three layers, not {lowers:?}").into());
    };
    assert_eq!(std::fs::read_to_string(bottom.join("etc/one"))?, "1");
    assert_eq!(std::fs::read_to_string(middle.join("etc/one"))?, "uno");
    assert_eq!(std::fs::metadata(middle.join("etc/two"))?.rdev(), 0);
    assert_eq!(std::fs::metadata(top.join("tmp"))?.mode() & 0o7777, 0o1777);
    Ok(())
}

async fn schema_2() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let gzip = |archive: Archive| (archive.end(), Compression::Gzip);
    let built = image(&[gzip(Archive::new().file("a", "a"))], json!({"Cmd": null}));
    let reference = registry.push(&built, "docker/app:1", &["--format", "v2s2"])?;
    let node = Node::new()?;
    let image = node.images.pull(&reference, None).await?;
    assert_eq!(image.layers.len(), 1);
    assert!(image.config.cmd.is_empty());
    Ok(())
}

async fn restart() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let built = three_layers();
    let reference = registry.push(&built, "app:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let before = node.images.pull(&reference, None).await?;
    let lowers = node.images.lease("c", &before.id).await?;
    let node = node.restart()?;
    let after = node
        .images
        .find(&reference)
        .ok_or("the image no longer exists")?;
    assert_eq!(after, before);
    assert_eq!(node.images.lease("c", &before.id).await?, lowers);
    assert_eq!(node.images.leases(), ["c"]);
    assert!(node.images.fs_usage()?.inodes > 0);
    Ok(())
}

async fn leased() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let built = three_layers();
    let reference = registry.push(&built, "app:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let image = node.images.pull(&reference, None).await?;
    let lowers = node.images.lease("c", &image.id).await?;
    node.images.remove(&reference).await?;
    assert!(node.images.find(&reference).is_none());
    let node = node.restart()?;
    assert!(lowers.iter().all(|lower| lower.is_dir()));
    assert_eq!(node.images.lease("c", &image.id).await?, lowers);
    assert!(node.images.lease("d", &image.id).await.is_err());
    node.images.release("c").await?;
    node.images.release("c").await?;
    node.becomes_clean().await?;
    Ok(())
}

async fn joined() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let built = three_layers();
    let reference = registry.push(&built, "app:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let pulls = (0..8).map(|_| node.images.pull(&reference, None));
    let pulled = futures_util::future::join_all(pulls).await;
    for image in pulled {
        assert_eq!(image?.id, built.id);
    }
    assert_eq!(node.leavings()?.len(), 3);
    Ok(())
}

/// Creates an authority and a certificate for 127.0.0.1 with openssl.
fn certificates(dir: &Dir) -> Result<(), Failure> {
    let script = r#"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
            -subj /CN=test-ca -keyout ca.key -out ca.pem
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
            -subj /CN=registry -keyout key.pem -out req.pem
        echo subjectAltName=IP:127.0.0.1 > ext
        openssl x509 -req -in req.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
            -extfile ext -out cert.pem"#;
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(&dir.0)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    Ok(())
}

async fn tls() -> Result<(), Failure> {
    let keys = Dir::new()?;
    certificates(&keys)?;
    let path = keys.0.display();
    let registry = Registry::start(&format!(
        ", tls: {{certificate: {path}/cert.pem, key: {path}/key.pem}}"
    ))?;
    let reference = registry.push(&three_layers(), "app:1", &["--preserve-digests"])?;
    let node = Node::new()?;
    let server = format!("server = \"https://{}\"\n", registry.host());
    node.hosts(&registry.host(), &server)?;
    let Err(error) = node.images.pull(&reference, None).await else {
        return Err("the certificate of an unknown authority was accepted".into());
    };
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("certificate"), "{error}");
    node.hosts(
        &registry.host(),
        &format!("{server}ca = \"{path}/ca.pem\"\n"),
    )?;
    node.images.pull(&reference, None).await?;
    node.images.remove(&reference).await?;
    node.hosts(&registry.host(), &format!("{server}skip_verify = true\n"))?;
    node.images.pull(&reference, None).await?;
    Ok(())
}

async fn hundred() -> Result<(), Failure> {
    let registry = Registry::start("")?;
    let layers: Vec<_> = (0..100)
        .map(|n| {
            let archive = Archive::new().file(&format!("file-{n}"), "x");
            (archive.end(), Compression::Gzip)
        })
        .collect();
    let reference = registry.push(&image(&layers, json!({})), "tall:1", &[])?;
    let node = Node::new()?;
    let image = node.images.pull(&reference, None).await?;
    let lowers = node.images.lease("c", &image.id).await?;
    assert_eq!(lowers.len(), 100);
    assert!(lowers[0].join("file-99").is_file() && lowers[99].join("file-0").is_file());
    // mount(2) accepts only one page of options. The paths of the layers relative to `layers/` must
    // therefore fit into one page.
    let short: usize = lowers
        .iter()
        .filter_map(|lower| lower.strip_prefix(node.root().join("layers")).ok())
        .map(|lower| lower.as_os_str().len() + 1)
        .sum();
    assert!(short < 4000);
    Ok(())
}
