//! Measures the pull and the removal of an image.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::cri::{CriOptions, Server, cpu_of_others, timed};
use crate::report::{self, Comparison};

pub(crate) async fn run(
    options: &CriOptions,
    servers: &mut [Server],
    results: &Path,
) -> Result<(Value, Vec<String>)> {
    let names: Vec<String> = servers.iter().map(|server| server.name.clone()).collect();
    let title = format!(
        "pulls of the image {} from the local registry (milliseconds)",
        options.pulled
    );
    let mut comparison = Comparison::new(
        title,
        &names,
        &[
            "PullImage",
            "RemoveImage",
            "CPU of the node, including the registry",
        ],
    );
    let mut skipped = Vec::new();
    let mut failed = vec![false; servers.len()];
    for round in 0..options.rounds.div_ceil(3) + 1 {
        for (server, out) in servers
            .iter_mut()
            .zip(&mut failed)
            .filter(|(_, out)| !**out)
        {
            match once(server, &options.pulled).await {
                Ok(times) if round > 0 => comparison.add(&server.name, &times),
                Ok(_) => {}
                Err(error) => {
                    skipped.push(format!("{} pull: {error}", server.name));
                    *out = true;
                }
            }
        }
    }
    report::show(results, &comparison.table())?;
    Ok((comparison.raw(), skipped))
}

async fn once(server: &mut Server, image: &str) -> Result<Vec<f64>> {
    let cpu = cpu_of_others()?;
    let (pull, ()) = timed(server.pull(image)).await?;
    let cpu = cpu_of_others()? - cpu;
    let (remove, ()) = timed(server.remove_image(image)).await?;
    Ok(vec![pull, remove, cpu])
}
