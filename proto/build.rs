//! Compiles cri/v1/*.proto to Rust, without `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let definition = protox::compile(
        ["cri/v1/runtime_service.proto", "cri/v1/image_service.proto"],
        ["."],
    )?;
    println!("cargo:rerun-if-changed=cri");
    tonic_prost_build::configure()
        // A stable order: what is stored and logged is the same from run to run.
        .btree_map(".")
        // Its Debug is in src/lib.rs and leaves the secrets out.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(definition)?;
    Ok(())
}
