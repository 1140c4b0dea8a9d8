//! The limits of a random config.json.

use serde_json::{Value, json};

use super::{Choices, set};

/// Adds limits of the controllers.
pub(super) fn limits(dice: &mut Choices, config: &mut Value) {
    let mut resources = json!({});
    for _ in 0..=dice.below(3) {
        let (name, value) = match dice.either(&[0, 1, 2, 3], &[4]) {
            0 => ("cpu", cpu(dice)),
            1 => ("memory", memory(dice)),
            2 => (
                "pids",
                json!({ "limit": dice.either(&[100_i64, -1, 4_194_304], &[0, 1, i64::MAX]) }),
            ),
            3 => ("unified", unified(dice)),
            _ => (
                "blockIO",
                json!({ "weight": dice.pick(&[10, 100, 1000, 0, 1001]) }),
            ),
        };
        resources[name] = value;
    }
    set(config, "/linux", "resources", resources);
}

fn cpu(dice: &mut Choices) -> Value {
    match dice.below(7) {
        0 => {
            let odd = [0, 1, 262_145, u64::MAX];
            json!({ "shares": dice.either(&[2, 1024, 262_144], &odd) })
        }
        // With a smaller part of a processor, the program does not exit in time.
        1 => json!({ "quota": dice.either(&[-1_i64, 50_000, 1_000_000], &[0, 999]) }),
        2 => {
            let period = dice.either(&[1000, 100_000, 1_000_000], &[0, 999, 1_000_001]);
            json!({ "quota": 500_000, "period": period })
        }
        3 => json!({ "quota": 1000, "period": 1000 }),
        4 => json!({ "cpus": dice.either(&["0", "0-1", "1,0", ""], &["99", "x"]) }),
        5 => json!({ "mems": dice.either(&["0", ""], &["99"]), "idle": dice.below(2) }),
        _ => {
            let burst = dice.either(&[0, 1000, 50_000], &[50_001]);
            json!({ "quota": 50_000, "burst": burst })
        }
    }
}

fn memory(dice: &mut Choices) -> Value {
    let large = 1_i64 << 30;
    match dice.below(5) {
        0 => json!({ "limit": dice.either(&[-1, large, large + 1], &[0, i64::MAX]) }),
        1 => {
            let swap = dice.either(&[-1, large, 2 * large], &[0, large - 1]);
            json!({ "limit": large, "swap": swap })
        }
        2 if dice.mistakes => json!({ "swap": dice.pick(&[-1, 0, large]) }),
        3 => json!({ "reservation": dice.either(&[-1, 4096, large], &[0]) }),
        _ => json!({ "limit": large, "swappiness": dice.either(&[0, 60, 100], &[200]) }),
    }
}

fn unified(dice: &mut Choices) -> Value {
    let all = [
        ("memory.high", "1073741824"),
        ("memory.min", "max"),
        ("pids.max", "200"),
        ("cpu.weight", "50"),
        ("cpu.max", "50000 100000"),
        ("memory.oom.group", "1"),
        ("cpu.weight", "0"),
        ("no.such", "1"),
        ("memory.high", "many"),
        ("../memory.high", "1"),
    ];
    let (usual, odd) = all.split_at(6);
    let (key, value) = dice.either(usual, odd);
    json!({ key: value })
}
