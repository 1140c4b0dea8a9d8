//! Converts the resources in CRI requests to the form of the runtime specification, for the
//! runtime's `create` and `update`.

use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use rrun_proto::v1::LinuxContainerResources;

use crate::cgroup;
use rrun_calls::error::{During, Error, Result};

/// The optional limits that the pod's cgroup supports. The server ignores requested limits that the
/// cgroup does not support. Kubelet sends limits for every huge page size of the node even if the
/// hugetlb controller is not available. A cgroup does not support swap limits if the kernel's swap
/// accounting is disabled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Controllers {
    pub hugetlb: bool,
    pub swap: bool,
}

impl Controllers {
    /// Returns the optional limits that a pod's cgroup supports. If systemd has not created the
    /// cgroup yet, this function checks the nearest existing ancestor. A file that cannot be read
    /// is an error, because the container would otherwise run without its limits.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        let dir = cgroup::nearest(dir);
        let controllers = dir.join("cgroup.controllers");
        let enabled = rrun_kernel::cgroup::read_file(&controllers)
            .during(|| format!("read {}", controllers.display()))?;
        let has = |controller: &str| {
            enabled
                .split_ascii_whitespace()
                .any(|name| name == controller)
        };
        // `dir` can be the root cgroup. The root cgroup has no file memory.swap.max, even with swap
        // accounting. So this function also looks for the file in systemd's system.slice.
        let below = dir.join("system.slice");
        let mut swap = false;
        for file in [dir, &below].map(|dir| dir.join("memory.swap.max")) {
            let exists = file.try_exists();
            swap |= exists.during(|| format!("find {}", file.display()))?;
        }
        Ok(Controllers {
            hugetlb: has("hugetlb"),
            swap: has("memory") && swap,
        })
    }
}

/// Returns the runtime specification's `linux.resources`, without devices. In the request, zero and
/// empty values mean "not specified".
pub(crate) fn limits(
    requested: &LinuxContainerResources,
    controllers: Controllers,
) -> Result<LinuxResources> {
    let mut limits = LinuxResources::default();
    limits.set_cpu(cpu(requested)?);
    limits.set_memory(memory(requested, controllers)?);
    if !(-1000..=1000).contains(&requested.oom_score_adj) {
        return Err(Error::invalid(format!(
            "oom_score_adj is {}, but it must be from -1000 to 1000",
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

/// Returns the result of [`limits`] as JSON for the runtime's `update`.
pub(crate) fn update_json(
    requested: &LinuxContainerResources,
    controllers: Controllers,
) -> Result<String> {
    serde_json::to_string(&limits(requested, controllers)?)
        .map_err(|error| Error::internal(format!("serialize the new limits: {error}")))
}

/// Returns the oom_score_adj of a container or of a pause process. If `restrict` is not set, the
/// result is the requested value. If `restrict` is set, the result is the requested value or the
/// server's own value, whichever is higher. A server without CAP_SYS_RESOURCE can't set a value
/// lower than its own.
pub(crate) fn oom_score_adj(requested: i64, restrict: bool) -> Result<i64> {
    const OWN: &str = "/proc/self/oom_score_adj";
    if !restrict {
        return Ok(requested);
    }
    // The kernel's: a file of procfs.
    let own = std::fs::read_to_string(OWN).during(|| format!("read {OWN}"))?;
    Ok(requested.max(own.trim().parse().unwrap_or_default()))
}

fn cpu(requested: &LinuxContainerResources) -> Result<Option<LinuxCpu>> {
    let text = |list: &String| (!list.is_empty()).then(|| list.clone());
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(requested.cpu_shares, "cpu_shares")?)
        .set_period(positive(requested.cpu_period, "cpu_period")?)
        // The quota -1 means no limit.
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
            "memory_swap_limit_in_bytes, {swap}, limits memory and swap together, so it must not be less than memory_limit_in_bytes, {limit}"
        )));
    }
    if limit == 0 {
        return Ok(None);
    }
    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(limit));
    if controllers.swap {
        // Without a requested swap limit, a container with a memory limit gets no swap.
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
                // An i64 can't represent a limit of 8 EiB or more. Such a limit becomes i64::MAX,
                // which has the same effect as no limit.
                .set_limit(page.limit.try_into().unwrap_or(i64::MAX));
            limit
        })
        .collect()
}

/// Returns the value of a field. The value 0 means that the field is not specified, and the result
/// is then `None`.
fn positive(value: i64, field: &str) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Error::invalid(format!(
            "{field} is {value}, but it must not be negative"
        ))),
    }
}

/// Returns the resources after an update. If `new` specifies a value, it replaces the old value.
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

/// Refuses a memory limit below the container's current memory usage. With such a limit, the kernel
/// would reclaim memory and then kill the container. Kubelet expects the server to reject the
/// update instead.
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
    fn unspecified_limits_are_not_written() -> Result<()> {
        let nothing = LinuxContainerResources::default();
        assert_eq!(update_json(&nothing, ALL)?, "{}");
        Ok(())
    }

    #[test]
    fn kubelets_resources_are_converted() -> Result<()> {
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
    fn an_update_keeps_unspecified_limits() {
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
