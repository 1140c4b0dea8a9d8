//! A pod with one container, and the CRI calls that kubelet makes for it.

use std::fs;
use std::path::PathBuf;

use rrun_proto::v1::{
    ContainerConfig, ContainerState, ContainerStatusRequest, CreateContainerRequest,
    ExecSyncRequest, ImageSpec, ListPodSandboxRequest, PodSandbox, PodSandboxConfig,
    PodSandboxState, RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use tonic::{Code, Status};

use crate::support::calls::{Calls, image};
use crate::support::images::pull;
use crate::support::machine::{Result, wait_for};

/// The exit code of the container of [`CriCall::Exit`].
pub(crate) const EXIT_CODE: i32 = 7;

/// The line that the container of [`CriCall::Exit`] writes.
pub(crate) const LINE: &str = "the last line";

/// How far a pod has been created. Each stage includes the previous one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Nothing,
    Image,
    Pod,
    Created,
    Running,
}

/// A call of the CRI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CriCall {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    /// StartContainer for a container that exits by itself, and its exit.
    Exit,
    ExecSync,
    StopContainer,
    RemoveContainer,
    StopPodSandbox,
    RemovePodSandbox,
    PullImage,
    RemoveImage,
    /// The start of the server after it was killed, which is not a call.
    StartServer,
}

/// The answer of the server to a call.
pub(crate) type Answer<T = ()> = std::result::Result<T, Status>;

impl CriCall {
    /// Returns whether the call stops or removes something.
    pub(crate) fn ends(self) -> bool {
        use CriCall::{
            RemoveContainer, RemoveImage, RemovePodSandbox, StopContainer, StopPodSandbox,
        };
        matches!(
            self,
            StopContainer | RemoveContainer | StopPodSandbox | RemovePodSandbox | RemoveImage
        )
    }

    /// Returns whether the call leaves nothing behind if it fails.
    pub(crate) fn rolls_back(self) -> bool {
        use CriCall::{CreateContainer, ExecSync, PullImage, RunPodSandbox};
        matches!(self, RunPodSandbox | CreateContainer | ExecSync | PullImage)
    }

    /// Makes the call for the pod or the container `subject`.
    pub(crate) fn run(self, calls: &Calls, subject: &mut Subject) -> Result<Answer> {
        match self {
            CriCall::RunPodSandbox => subject.run_pod(calls),
            CriCall::CreateContainer => subject.create(calls),
            CriCall::StartContainer => subject.start(calls),
            CriCall::Exit => subject.exit(calls),
            CriCall::ExecSync => subject.exec(calls),
            CriCall::StopContainer => subject.stop_container(calls),
            CriCall::RemoveContainer => subject.remove_container(calls),
            CriCall::StopPodSandbox => stop_pod(calls, &subject.pod_id),
            CriCall::RemovePodSandbox => remove_pod(calls, &subject.pod_id),
            CriCall::PullImage => Ok(pull(calls, &subject.image, None)?.map(drop)),
            CriCall::RemoveImage => remove_image(calls, &subject.image),
            CriCall::StartServer => Ok(Ok(())),
        }
    }
}

/// A pod with one container.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject {
    pub(crate) pod: PodSandboxConfig,
    pub(crate) container: ContainerConfig,
    /// The container's image.
    pub(crate) image: String,
    /// True if the image is removed after the call, too.
    pub(crate) without_image: bool,
    pub(crate) log: PathBuf,
    /// The ids that the server returned. An id is empty before its object has been created.
    pub(crate) pod_id: String,
    pub(crate) container_id: String,
}

impl Subject {
    /// Gives the pod another name and no host ports.
    pub(crate) fn rename(&mut self, name: &str) {
        if let Some(metadata) = &mut self.pod.metadata {
            name.clone_into(&mut metadata.name);
        }
        self.pod.port_mappings.clear();
        self.pod_id.clear();
    }

    /// Makes calls until the stage `stage` is reached. All calls must succeed.
    pub(crate) fn reach(&mut self, calls: &Calls, stage: Stage) -> Result {
        let failed = |status: Status| format!("a call without a fault failed: {status:?}");
        if stage >= Stage::Image {
            pull(calls, &self.image, None)?.map_err(failed)?;
        }
        if stage >= Stage::Pod {
            self.run_pod(calls)?.map_err(failed)?;
        }
        if stage >= Stage::Created {
            self.create(calls)?.map_err(failed)?;
        }
        if stage >= Stage::Running {
            self.start(calls)?.map_err(failed)?;
            // The container must handle SIGTERM before it is stopped.
            wait_for("the container to write `ready`", || {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                Ok(log.contains("ready").then_some(()))
            })?;
        }
        Ok(())
    }

    /// Removes all pods, and the image if the subject requires it.
    pub(crate) fn remove(&mut self, calls: &Calls) -> Result {
        for pod in pods(calls)? {
            stop_pod(calls, &pod.id)?.map_err(|status| format!("StopPodSandbox: {status:?}"))?;
            remove_pod(calls, &pod.id)?
                .map_err(|status| format!("RemovePodSandbox: {status:?}"))?;
        }
        if self.without_image {
            remove_image(calls, &self.image)?
                .map_err(|status| format!("RemoveImage: {status:?}"))?;
        }
        let _ = fs::remove_file(&self.log);
        self.pod_id.clear();
        self.container_id.clear();
        Ok(())
    }

    /// Returns whether all existing pods are ready.
    pub(crate) fn is_ready(&self, calls: &Calls) -> Result<bool> {
        let ready = |state| state == PodSandboxState::SandboxReady as i32;
        Ok(pods(calls)?.iter().all(|pod| ready(pod.state)))
    }

    fn run_pod(&mut self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = RunPodSandboxRequest {
            config: Some(self.pod.clone()),
            ..RunPodSandboxRequest::default()
        };
        let answer = calls.wait(async move { client.run_pod_sandbox(request).await })?;
        Ok(answer.map(|answer| self.pod_id = answer.into_inner().pod_sandbox_id))
    }

    fn create(&mut self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = CreateContainerRequest {
            pod_sandbox_id: self.pod_id.clone(),
            config: Some(self.container.clone()),
            sandbox_config: Some(self.pod.clone()),
        };
        let answer = calls.wait(async move { client.create_container(request).await })?;
        Ok(answer.map(|answer| self.container_id = answer.into_inner().container_id))
    }

    fn start(&self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = StartContainerRequest {
            container_id: self.container_id.clone(),
        };
        let answer = calls.wait(async move { client.start_container(request).await })?;
        Ok(answer.map(drop))
    }

    /// Starts the container, waits for its exit, and checks its exit code and its log.
    fn exit(&self, calls: &Calls) -> Result<Answer> {
        let status = || {
            let mut client = calls.runtime();
            let request = ContainerStatusRequest {
                container_id: self.container_id.clone(),
                verbose: false,
            };
            let answer = calls.wait(async move { client.container_status(request).await })?;
            Ok::<_, crate::support::machine::Failed>(
                answer.map(|answer| answer.into_inner().status.unwrap_or_default()),
            )
        };
        match status()? {
            Err(status) => return Ok(Err(status)),
            Ok(found) if found.state() == ContainerState::ContainerCreated => {
                if let Err(status) = self.start(calls)? {
                    return Ok(Err(status));
                }
            }
            Ok(_) => {}
        }
        let exited = wait_for("the container to exit", || match status()? {
            Ok(found) if found.state() == ContainerState::ContainerExited => Ok(Some(Ok(found))),
            Ok(_) => Ok(None),
            Err(status) => Ok(Some(Err(status))),
        })?;
        let found = match exited {
            Ok(found) => found,
            Err(status) => return Ok(Err(status)),
        };
        if found.exit_code != EXIT_CODE {
            let text = format!(
                "the exit code is {}, the reason {} {}",
                found.exit_code, found.reason, found.message
            );
            return Ok(Err(Status::new(Code::Aborted, text)));
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        if !log.contains(LINE) && !log.contains("are lost") && !log.contains("is lost") {
            let text = format!("the log lacks a line: {log:?}");
            return Ok(Err(Status::new(Code::Aborted, text)));
        }
        Ok(Ok(()))
    }

    fn exec(&self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = ExecSyncRequest {
            container_id: self.container_id.clone(),
            cmd: ["sh", "-c", "echo out; echo err >&2; exit 3"]
                .map(String::from)
                .to_vec(),
            timeout: 0,
        };
        let answer = calls.wait(async move { client.exec_sync(request).await })?;
        Ok(answer.and_then(|answer| {
            let answer = answer.into_inner();
            let found = (
                answer.stdout.as_slice(),
                answer.stderr.as_slice(),
                answer.exit_code,
            );
            if found == (b"out\n".as_slice(), b"err\n".as_slice(), 3) {
                Ok(())
            } else {
                Err(Status::new(
                    Code::Aborted,
                    format!("the result is {answer:?}"),
                ))
            }
        }))
    }

    fn stop_container(&self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = StopContainerRequest {
            container_id: self.container_id.clone(),
            timeout: 5,
        };
        let answer = calls.wait(async move { client.stop_container(request).await })?;
        Ok(answer.map(drop))
    }

    pub(crate) fn remove_container(&self, calls: &Calls) -> Result<Answer> {
        let mut client = calls.runtime();
        let request = RemoveContainerRequest {
            container_id: self.container_id.clone(),
        };
        let answer = calls.wait(async move { client.remove_container(request).await })?;
        Ok(answer.map(drop))
    }
}

/// Lists all pods. A fault can close the client's connection, so the call is repeated once.
fn pods(calls: &Calls) -> Result<Vec<PodSandbox>> {
    let list = || {
        let mut client = calls.runtime();
        let request = ListPodSandboxRequest::default();
        calls.wait(async move { client.list_pod_sandbox(request).await })
    };
    let listed = match list()? {
        Err(_) => list()?,
        listed => listed,
    };
    Ok(listed?.into_inner().items)
}

fn stop_pod(calls: &Calls, id: &str) -> Result<Answer> {
    let mut client = calls.runtime();
    let request = StopPodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    let answer = calls.wait(async move { client.stop_pod_sandbox(request).await })?;
    Ok(answer.map(drop))
}

fn remove_pod(calls: &Calls, id: &str) -> Result<Answer> {
    let mut client = calls.runtime();
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    let answer = calls.wait(async move { client.remove_pod_sandbox(request).await })?;
    Ok(answer.map(drop))
}

fn remove_image(calls: &Calls, name: &str) -> Result<Answer> {
    let mut client = calls.image();
    let request = RemoveImageRequest {
        image: Some(ImageSpec { ..image(name) }),
    };
    let answer = calls.wait(async move { client.remove_image(request).await })?;
    Ok(answer.map(drop))
}
