//! Tests of the controllers that limits need, and of the values that rrun writes to cgroup files.

use super::*;
use crate::cgroup::validate;

fn read_resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

#[test]
fn the_controller_of_every_limit_is_listed_once() {
    let resources = read_resources(
        r#"{"memory":{"limit":1},"cpu":{"shares":102,"quota":50000,"cpus":"0"},
            "pids":{"limit":5},"unified":{"memory.min":"1","hugetlb.2MB.max":"0"}}"#,
    );
    let mut controllers: Vec<String> = needed(&resources)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    controllers.sort();
    assert_eq!(controllers, ["cpu", "cpuset", "hugetlb", "memory", "pids"]);
    for json in [
        r#"{"memory":{"limit":0},"cpu":{"shares":0}}"#,
        r#"{"cpu":{"shares":1024}}"#,
        r#"{"memory":{"limit":-1,"swap":-1},"cpu":{"quota":-1,"period":100000},
            "pids":{"limit":-1},"blockIO":{},"unified":{"memory.high":"max"}}"#,
    ] {
        assert!(needed(&read_resources(json)).is_empty(), "{json}");
    }
}

#[test]
fn the_swap_limit_of_the_cgroup_does_not_include_memory() {
    for (json, content) in [
        (r#"{"memory":{"limit":100,"swap":100}}"#, Some("0")),
        (r#"{"memory":{"limit":100,"swap":150}}"#, Some("50")),
        (r#"{"memory":{"limit":100,"swap":-1}}"#, Some("max")),
        (r#"{"memory":{"limit":100}}"#, None),
    ] {
        let resources = read_resources(json);
        assert_eq!(swap_max(&resources).as_deref(), content, "{json}");
        assert!(validate(Path::new("/a"), &resources).is_ok());
    }
    let less = read_resources(r#"{"memory":{"limit":100,"swap":50}}"#);
    assert!(validate(Path::new("/a"), &less).is_err());
}

#[test]
fn a_new_memory_limit_keeps_the_limit_on_the_sum_of_memory_and_swap() {
    let nowhere = Path::new("/nowhere");
    let completed = |last, json| {
        let mut resources = read_resources(json);
        complete_update(nowhere, last, &mut resources).unwrap();
        swap_max(&resources)
    };
    let limit = r#"{"memory":{"limit":100}}"#;
    assert_eq!(completed(150, limit).as_deref(), Some("50"));
    assert_eq!(completed(0, limit), None);
    assert_eq!(completed(-1, limit), None);
    let alone = r#"{"memory":{"limit":100},"unified":{"memory.swap.max":"0"}}"#;
    assert_eq!(completed(150, alone), None);
    for (json, last) in [
        (limit, None),
        (r#"{"memory":{"limit":100,"swap":150}}"#, Some(150)),
        (r#"{"memory":{"limit":-1}}"#, Some(-1)),
        (r#"{"memory":{"swap":-1}}"#, Some(-1)),
        (r#"{"cpu":{}}"#, None),
    ] {
        assert_eq!(memory_swap(&read_resources(json)), last, "{json}");
    }
}

#[test]
fn weights_correspond_at_the_minimum_the_default_and_the_maximum() {
    for (shares, weight) in [
        (0, 1),
        (2, 1),
        (102, 17),
        (1024, 100),
        (262_144, 10_000),
        (u64::MAX, 10_000),
    ] {
        assert_eq!(cpu_weight(shares), weight, "{shares}");
    }
    for (given, weight) in [(10, 1), (500, 4950), (1000, 10_000)] {
        assert_eq!(io_weight(given), weight, "{given}");
    }
}

#[test]
fn the_error_for_a_setting_that_cgroup_v2_lacks_names_the_field() {
    for (json, field) in [
        (r#"{"memory":{"swappiness":0}}"#, "memory.swappiness"),
        (
            r#"{"memory":{"disableOOMKiller":true}}"#,
            "memory.disableOOMKiller",
        ),
        (r#"{"network":{"classID":1}}"#, "network"),
        (
            r#"{"cpu":{"realtimeRuntime":1000}}"#,
            "linux.resources.cpu.realtimeRuntime",
        ),
        (r#"{"cpu":{"idle":2}}"#, "linux.resources.cpu.idle"),
        (r#"{"blockIO":{"leafWeight":10}}"#, "blockIO.leafWeight"),
        (r#"{"blockIO":{"weight":5}}"#, "blockIO.weight"),
        (
            r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#,
            "hugepageLimits.pageSize",
        ),
        (r#"{"unified":{"cgroup.procs":"1"}}"#, "cgroup.procs"),
        (r#"{"unified":{"../memory.max":"1"}}"#, "../memory.max"),
    ] {
        let error = validate(Path::new("/a"), &read_resources(json)).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    let none = LinuxResources::default();
    assert!(validate(Path::new("/a/../../b"), &none).is_err());
}
