"""`python -m launch check …`: are these hosts fit to train this together? A table, and a line for each fault."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cloze.errors import ExitCode
from cloze.log import log
from launch.job import Job
from launch.nodes import on_host
from launch.supervise import supervise
from pretrain.config import TrainConfig

_ANSWER_SECONDS = 120.0
_MOST_CLOCK_SECONDS = 5.0  # an answer takes up to a second to arrive from a busy host
_MOST_MEMORY_MIB = 1000  # a GPU that has more in use is somebody else's
_COLUMNS = ("python", "torch", "deepspeed", "code", "configuration", "data")


def check(job: Job, config: TrainConfig) -> int:
    """Compare the hosts, then let all ranks of `job` sum and measure. Prints; returns 0, or 64 for a fault."""
    with ThreadPoolExecutor(len(job.hosts)) as pool:
        found = dict(zip(job.hosts, pool.map(lambda host: ask(host, job), job.hosts), strict=True))
    print(table(found))
    faults = compare(found, job.hosts)
    if faults:
        for fault in faults:
            log.error(fault)
        return ExitCode.USAGE
    code = supervise(measuring(job, config))
    if code == ExitCode.OK:
        print("fit to train")
    elif code not in (ExitCode.USAGE, ExitCode.STOPPED):
        log.error(f"{', '.join(job.hosts)}: their ranks ended before all was measured; see above")
        return ExitCode.USAGE
    return code


def measuring(job: Job, config: TrainConfig) -> Job:
    """The job that measures in the place of training."""
    return replace(
        job,
        module="launch.preflight.speed",
        overrides=(config.runs_root, *job.hosts),
        environment={**job.environment, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # its warnings would bury our one line
        run_dir=None,
        restarts=0,
    )


def ask(host: str, job: Job) -> dict[str, Any]:
    """A host's facts, or {"error": why there are none}."""
    command = on_host(host, ("launch.preflight.facts",), job.ssh, job.lost_after)
    request = json.dumps(job.overrides) + "\n"
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_ANSWER_SECONDS:.0f} s; see whether it is overloaded"}
    arrived = time.time()
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return {"error": f"{last}; see that `ssh {host} true` works without a password, and install Cloze there"}
    if "time" in facts:
        facts["clock"] = facts["time"] - arrived
    return facts


def compare(found: Mapping[str, Mapping[str, Any]], slots: Mapping[str, int | None]) -> list[str]:
    """A line for everything that is wrong: what, where, what to do. What most hosts have is right."""
    faults = [f"{host}: {facts['error']}" for host, facts in found.items() if "error" in facts]
    good = {host: facts for host, facts in found.items() if "error" not in facts}
    for name in next((facts["equal"] for facts in good.values()), ()):
        right, _ = Counter(facts["equal"][name] for facts in good.values()).most_common(1)[0]
        like = next(host for host, facts in good.items() if facts["equal"][name] == right)
        faults += [
            f"{host}: {name} is {facts['equal'][name]}, {like} has {right}; make them equal"
            for host, facts in good.items()
            if facts["equal"][name] != right
        ]
    first: dict[str, str] = {}
    for host, facts in good.items():
        if (other := first.setdefault(facts["machine"], host)) != host:
            faults.append(f"{host}: is {other} under another name; name it once in the hostfile, with all its slots")
    clocks = sorted(facts["clock"] for facts in good.values())
    kinds = Counter(gpu["name"] for facts in good.values() for gpu in facts["gpus"] if "error" not in gpu)
    for host, facts in good.items():
        off = facts["clock"] - clocks[len(clocks) // 2]
        if abs(off) > _MOST_CLOCK_SECONDS:
            faults.append(f"{host}: its clock is off by {off:+.1f} s; start an NTP client there")
        for key, (free, needed) in facts["disks"].items():
            if free < needed:
                sizes = f"{free / 2**30:.1f} GiB free for {key}, {needed / 2**30:.1f} are needed"
                faults.append(f"{host}: {sizes}; make room, or set {key} to a larger disk")
        if facts["data_missing"]:
            faults.append(f"{host}: {facts['data_missing']}: not there; copy the corpus, or share its directory")
        faults += _gpu_faults(host, facts["gpus"], slots[host], kinds)
    return faults


def _gpu_faults(host: str, gpus: Sequence[Mapping[str, str]], slots: int | None, kinds: Mapping[str, int]) -> list[str]:
    faults = [f"{host}: nvidia-smi: {gpu['error']}; repair its driver" for gpu in gpus if "error" in gpu]
    if faults:
        return faults
    if kinds and len(gpus) < (slots or 1):
        faults.append(f"{host}: {len(gpus)} GPUs for {slots or 1} processes; correct the hostfile, or repair the host")
    for number, gpu in enumerate(gpus[:slots]):
        where = f"{host}: GPU {number}"
        if gpu["name"] != max(kinds, key=lambda kind: kinds[kind]):
            faults.append(f"{where}: {gpu['name']}, others are not; all ranks would wait for the slower")
        if (used := _number(gpu["memory.used"])) > _MOST_MEMORY_MIB:
            faults.append(f"{where}: {used} MiB in use; end the process that has them")
        if errors := _number(gpu["ecc.errors.uncorrected.volatile.total"]):
            faults.append(f"{where}: {errors} uncorrected memory errors; reset or replace it")
    return faults


def _number(text: str) -> int:
    """A figure of nvidia-smi's, which writes [N/A] for what a kind of GPU does not have."""
    return int(text) if text.isdecimal() else 0


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [" ".join([f"{'host':20}", *(f"{name:13}" for name in _COLUMNS), "disk free     clock  GPUs"])]
    for host, facts in found.items():
        if "error" in facts:
            lines.append(f"{host:20} no answer")
            continue
        values = [f"{facts['equal'][name]:13}" for name in _COLUMNS]
        gpus = sum("error" not in gpu for gpu in facts["gpus"])
        rest = f"{facts['disks']['runs_root'][0] / 2**30:5.0f} GiB {facts['clock']:+8.2f} s  {gpus}"
        lines.append(" ".join([f"{host:20}", *values, rest]))
    return "\n".join(lines)
