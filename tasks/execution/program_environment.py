"""Build the environment variables of a program: without secrets, network access and too many threads.

One program has secrets and asks a server: that of a stage in which a model behind an endpoint judges.
"""

import os
import re
import site
import sys
from collections.abc import Mapping
from typing import Any

from tasks.artifacts.code_version import ROOT
from tasks.artifacts.store import home
from tasks.config.machine import Machine
from tasks.config.sections.judges import JUDGE_KEY, JUDGE_URL, EndpointJudge

# Programs get their inputs as files: no library may use the network, send telemetry or draw progress bars.
QUIET = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Programs read untrusted files and need no server, so they get no credentials. A proxy's URL may hold one.
SECRET = re.compile(
    r"^(PREFECT|MLFLOW|AWS|AZURE|GOOGLE|PG|WANDB|DATABRICKS|KUBE)"
    r"|^ALIGNFLOW_(DATABASE|ALERT_WEBHOOK|FORK_SERVER|JUDGE_URL|JUDGE_KEY)$"
    r"|PROXY$|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNING_?KEY|WEBHOOK"
    r"|COOKIE|JWT|CONNECTION_STRING|_(DSN|PWD|PAT|KEY)$",
    re.IGNORECASE,
)
NOT_SECRET = {"TOKENIZERS_PARALLELISM"}
LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # a URL with a password, in a variable of any name
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# OpenMP threads spin this often for each other before they sleep. On an idle machine that is as fast as the
# default; beside other work, for which the default is not meant, a training step was more than twice as fast.
SPIN_COUNT = "10000"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# bitsandbytes has four functions compiled when it is imported, of which a CPU runs none. Without this, each
# program would load torch's compiler for them: a fifth of its start.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}


def program_environment(machine: Machine) -> dict[str, str]:
    """Return the environment of a program that runs as one process."""
    variables = {"GOMP_SPINCOUNT": SPIN_COUNT, **without_secrets(os.environ), **QUIET}
    if not may_use_gpu(machine):
        variables = UNCOMPILED | variables
    variables["ALIGNFLOW_HOME"] = str(home())  # where token ids and a judge's replies are kept
    for name in TORCHRUN:  # set if this process itself was started by torchrun
        variables.pop(name, None)
    if machine.threads:
        variables["OMP_NUM_THREADS"] = str(machine.threads)
    if str(ROOT) not in site.getsitepackages():  # a source tree: run the code whose hash is in the key
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *inherited])
    return variables


def may_use_gpu(machine: Machine) -> bool:
    """Return whether a program on this machine may come to use a GPU."""
    return sys.platform != "linux" or (machine.device != "cpu" and any(map(os.path.exists, GPU_DEVICES)))


def distributed_environment(machine: Machine, processes: int) -> dict[str, str]:
    """Return the environment of each of several processes, which share the cores by default."""
    share = max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(share), **program_environment(machine)}


def endpoint_variables(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the endpoint's address and key if a model behind one judges in the job; else nothing."""
    judge = job.get("judge") or {}
    if judge.get("kind") != EndpointJudge.model_fields["kind"].default:
        return {}
    return {name: os.environ[name] for name in (JUDGE_URL, JUDGE_KEY) if name in os.environ}


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that hold no credentials of servers, databases or accounts."""
    return {
        name: value
        for name, value in variables.items()
        if name in NOT_SECRET or not (SECRET.search(name) or LOGIN.search(value))
    }
