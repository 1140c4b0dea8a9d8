//! Compiles cri/v1/*.proto to Rust, without `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let definition = protox::compile(
        ["cri/v1/runtime_service.proto", "cri/v1/image_service.proto"],
        ["."],
    )?;
    println!("cargo:rerun-if-changed=cri");
    tonic_prost_build::configure()
        // Protobuf maps become BTreeMaps, whose entries have a stable order. As a result, a message
        // has the same text in the store and in the log in every run.
        .btree_map(".")
        // src/lib.rs implements Debug for AuthConfig without the secrets.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(definition)?;
    Ok(())
}
