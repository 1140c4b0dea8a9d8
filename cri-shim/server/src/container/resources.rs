//! The CRI's resources as the runtime specification's, for create and for update.

use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use rrun_proto::v1::LinuxContainerResources;

use crate::cgroup;
use rrun_calls::error::{Error, Result};

/// What the pod's cgroup can limit at all: kubelet names limits for every huge page size of the
/// node whether or not a controller is there, and swap accounting can be off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Controllers {
    pub hugetlb: bool,
    pub swap: bool,
}

impl Controllers {
    /// Those of a pod's cgroup, or of the nearest above it that systemd has made.
    pub(crate) fn of(dir: &Path) -> Self {
        let dir = cgroup::nearest(dir);
        let there = cgroup::read(dir, "cgroup.controllers").unwrap_or_default();
        let has = |wanted: &str| there.split_ascii_whitespace().any(|name| name == wanted);
        // The root has no such files; a slice of systemd's does.
        let below = dir.join("system.slice");
        let swap = [dir, &below].map(|dir| dir.join("memory.swap.max").exists());
        Controllers {
            hugetlb: has("hugetlb"),
            swap: has("memory") && swap.contains(&true),
        }
    }
}

/// The specification's `linux.resources`, without devices. Zero and empty are "not specified".
pub(crate) fn limits(
    requested: &LinuxContainerResources,
    controllers: Controllers,
) -> Result<LinuxResources> {
    let mut limits = LinuxResources::default();
    limits.set_cpu(cpu(requested)?);
    limits.set_memory(memory(requested, controllers)?);
    if !(-1000..=1000).contains(&requested.oom_score_adj) {
        return Err(Error::invalid(format!(
            "oom_score_adj is {}, it can be from -1000 to 1000",
            requested.oom_score_adj
        )));
    }
    if controllers.hugetlb && !requested.hugepage_limits.is_empty() {
        limits.set_hugepage_limits(Some(hugepage_limits(requested)));
    }
    if !requested.unified.is_empty() {
        let unified = requested.unified.clone();
        limits.set_unified(Some(unified.into_iter().collect()));
    }
    Ok(limits)
}

/// [`limits`] as the runtime's `update` reads them.
pub(crate) fn update_json(
    requested: &LinuxContainerResources,
    controllers: Controllers,
) -> Result<String> {
    serde_json::to_string(&limits(requested, controllers)?)
        .map_err(|error| Error::internal(format!("write the new limits: {error}")))
}

fn cpu(requested: &LinuxContainerResources) -> Result<Option<LinuxCpu>> {
    let text = |list: &String| (!list.is_empty()).then(|| list.clone());
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(requested.cpu_shares, "cpu_shares")?)
        .set_period(positive(requested.cpu_period, "cpu_period")?)
        // -1 is no limit.
        .set_quota((requested.cpu_quota != 0).then_some(requested.cpu_quota))
        .set_cpus(text(&requested.cpuset_cpus))
        .set_mems(text(&requested.cpuset_mems));
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

fn memory(
    requested: &LinuxContainerResources,
    controllers: Controllers,
) -> Result<Option<LinuxMemory>> {
    let limit = requested.memory_limit_in_bytes;
    let swap = requested.memory_swap_limit_in_bytes;
    if swap > 0 && (limit <= 0 || swap < limit) {
        return Err(Error::invalid(format!(
            "memory_swap_limit_in_bytes is {swap}, memory and swap together, and memory_limit_in_bytes {limit}: it can't be less"
        )));
    }
    if limit == 0 {
        return Ok(None);
    }
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(limit));
    if controllers.swap {
        // Unless it says otherwise a container with a memory limit does not swap beyond it.
        memory.set_swap(Some(if swap == 0 { limit } else { swap }));
    }
    Ok(Some(memory))
}

fn hugepage_limits(requested: &LinuxContainerResources) -> Vec<LinuxHugepageLimit> {
    let pages = requested.hugepage_limits.iter();
    pages
        .map(|page| {
            let mut limit = LinuxHugepageLimit::default();
            limit
                .set_page_size(page.page_size.clone())
                // Beyond 8 EiB, which the type can't hold, it limits nothing.
                .set_limit(page.limit.try_into().unwrap_or(i64::MAX));
            limit
        })
        .collect()
}

/// A number that is specified.
fn positive(value: i64, field: &str) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Error::invalid(format!(
            "{field} is {value}, it can't be negative"
        ))),
    }
}

/// What holds after an update: what it specifies, over what there was.
pub(crate) fn updated(
    old: &LinuxContainerResources,
    new: &LinuxContainerResources,
) -> LinuxContainerResources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &String, new: &String| if new.is_empty() { old } else { new }.clone();
    let mut unified = old.unified.clone();
    unified.extend(new.unified.clone());
    LinuxContainerResources {
        cpu_period: number(old.cpu_period, new.cpu_period),
        cpu_quota: number(old.cpu_quota, new.cpu_quota),
        cpu_shares: number(old.cpu_shares, new.cpu_shares),
        memory_limit_in_bytes: number(old.memory_limit_in_bytes, new.memory_limit_in_bytes),
        oom_score_adj: number(old.oom_score_adj, new.oom_score_adj),
        cpuset_cpus: text(&old.cpuset_cpus, &new.cpuset_cpus),
        cpuset_mems: text(&old.cpuset_mems, &new.cpuset_mems),
        hugepage_limits: if new.hugepage_limits.is_empty() {
            old.hugepage_limits.clone()
        } else {
            new.hugepage_limits.clone()
        },
        unified,
        memory_swap_limit_in_bytes: number(
            old.memory_swap_limit_in_bytes,
            new.memory_swap_limit_in_bytes,
        ),
    }
}

/// Refuses a memory limit that the container is above already: the kernel would reclaim and then
/// kill, and kubelet expects an error instead.
pub(crate) fn check_use(dir: &Path, new: &LinuxContainerResources) -> Result<()> {
    let limit = match u64::try_from(new.memory_limit_in_bytes) {
        Ok(limit) if limit > 0 => limit,
        _ => return Ok(()),
    };
    match cgroup::number(dir, "memory.current") {
        Some(used) if used > limit => Err(Error::wrong_state(format!(
            "the new memory limit of {limit} bytes is below the {used} bytes in use"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::HugepageLimit;
    use serde_json::json;

    use super::*;

    const ALL: Controllers = Controllers {
        hugetlb: true,
        swap: true,
    };

    #[test]
    fn what_is_not_specified_is_not_there() -> Result<()> {
        let nothing = LinuxContainerResources::default();
        assert_eq!(update_json(&nothing, ALL)?, "{}");
        Ok(())
    }

    #[test]
    fn kubelets_resources_for_a_web_server() -> Result<()> {
        let requested = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 102,
            memory_limit_in_bytes: 64 << 20,
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let memory = 64 << 20;
        assert_eq!(
            json!(limits(&requested, ALL)?),
            json!({
                "cpu": { "shares": 102, "period": 100_000, "quota": 50_000 },
                "memory": { "limit": memory, "swap": memory },
                "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }],
                "unified": { "memory.oom.group": "1" },
            })
        );
        let poor = json!(limits(&requested, Controllers::default())?);
        assert_eq!(poor["memory"], json!({ "limit": memory }));
        assert_eq!(poor.get("hugepageLimits"), None);
        Ok(())
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let old = LinuxContainerResources {
            cpu_shares: 2,
            memory_limit_in_bytes: 5,
            ..Default::default()
        };
        let new = LinuxContainerResources {
            cpu_quota: 7,
            memory_limit_in_bytes: 6,
            ..Default::default()
        };
        let both = updated(&old, &new);
        assert_eq!(
            (both.cpu_shares, both.cpu_quota, both.memory_limit_in_bytes),
            (2, 7, 6)
        );
    }
}
