"""Which rank a process is, by the variables of each launcher as they were seen on the real one; hosts of Slurm."""

import itertools
import re
import string
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.errors import UserError
from pretrain.hostlist import hosts_of
from pretrain.launchers import Ranks, port_remedy, ranks_of

DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2",
}  # fmt: skip
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "gpu1", "MASTER_PORT": "41337",
    "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
PYTORCHJOB = {
    "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "bert-master-0", "MASTER_PORT": "23456", "PET_NNODES": "2",
    "PYTHONUNBUFFERED": "0",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "1357840385", "PMIX_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1357840384.0;tcp://127.0.0.1,10.251.7.1,172.17.0.1:41017",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "rack[0-1]node[2-3]", "SLURM_STEP_NUM_NODES": "2", "SLURM_TASK_PID": "99",
    "SLURM_JOB_NODELIST": "rack[0-1]node[2-3]", "SLURM_NNODES": "4",
}  # fmt: skip
SAGEMAKER = {"SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "1"}

MPIRUN, SLURMD = frozenset({"bash", "mpirun"}), frozenset({"slurmd", "slurmstepd"})
SHELL = frozenset({"bash", "sshd", "systemd"})


def place(environment: Mapping[str, str], names: frozenset[str] | None = SHELL) -> tuple[int, int, int, str] | None:
    ranks = ranks_of(environment, names).ranks
    return ranks and ranks[:4]


@pytest.mark.parametrize(
    ("environment", "names", "expected"),
    [
        (DEEPSPEED, SHELL, (3, 4, 1, "10.0.0.1")),
        (TORCHRUN, SHELL, (1, 2, 0, "gpu1")),
        (PYTORCHJOB, frozenset(), (1, 2, 0, "bert-master-0")),
        (OPENMPI, MPIRUN, (1, 2, 1, "127.0.0.1")),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"orted"}, (1, 2, 1, "10.251.7.1")),
        (OPENMPI | {"MASTER_ADDR": "gpu7"}, MPIRUN, (1, 2, 1, "gpu7")),
        (HYDRA, frozenset({"hydra_pmi_proxy"}), (1, 2, 1, "127.0.0.1")),
        (SLURM, SLURMD, (1, 2, 0, "rack0node2")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, SLURMD, (1, 2, 0, "127.0.0.1")),
        (SLURM | {"MASTER_ADDR": "ib-gpu1", "MASTER_PORT": "1234"}, SLURMD, (1, 2, 0, "ib-gpu1")),
        (SLURM, None, (1, 2, 0, "rack0node2")),  # in a container, which hides slurmstepd
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, SHELL, (1, 2, 0, "127.0.0.1")),  # set by hand
        (SAGEMAKER, frozenset(), (1, 2, 0, "algo-1")),
        # one inside the other
        (SLURM | {"SLURM_PROCID": "0"} | TORCHRUN, SLURMD, (1, 2, 0, "gpu1")),
        (SLURM | {"SLURM_PROCID": "0"} | OPENMPI, SLURMD | {"orted"}, (1, 2, 1, "127.0.0.1")),
        (SLURM | {"PMI_RANK": "1", "PMI_SIZE": "2"}, SLURMD, (1, 2, 0, "rack0node2")),
        (SLURM | {"RANK": "0"}, SLURMD, (1, 2, 0, "rack0node2")),
        (OPENMPI | DEEPSPEED | {"RANK": "1", "WORLD_SIZE": "2"}, MPIRUN, (1, 2, 1, "10.0.0.1")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"} | SLURM, SLURMD, (1, 2, 0, "a")),
        # nothing to tell, or a world of one
        ({}, SHELL, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, SLURMD, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, SHELL, (0, 1, 0, "127.0.0.1")),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1", "SM_NUM_GPUS": "1"}, SHELL, None),
    ],
)
def test_each_launcher(
    environment: dict[str, str], names: frozenset[str] | None, expected: tuple[int, int, int, str] | None
) -> None:
    found = ranks_of(environment, names and frozenset(names))
    assert found.note is None
    assert (found.ranks and found.ranks[:4]) == expected


def test_ports_are_the_job_s() -> None:
    """All ranks of a job have one; the next job, or the next step, another."""
    ports = [
        ranks_of(environment | more, None).ranks.port  # type: ignore[union-attr]
        for environment, more in [
            (OPENMPI, {}), (OPENMPI, {"OMPI_COMM_WORLD_RANK": "0"}), (OPENMPI, {"PMIX_NAMESPACE": "2"}),
            (SLURM, {}), (SLURM, {"SLURM_PROCID": "0"}), (SLURM, {"SLURM_STEP_ID": "1"}),
            (SLURM, {"MASTER_PORT": "1234"}),
        ]
    ]  # fmt: skip
    assert ports[0] == ports[1] != ports[2]
    assert ports[3] == ports[4] != ports[5]
    assert ports[6] == 1234
    assert all(20_000 <= port < 32_000 for port in ports[:6])


@pytest.mark.parametrize(
    ("environment", "names", "words"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, SHELL, "SLURM_NTASKS=2"),  # salloc's shell
        ({k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}, SLURMD, "by srun"),  # a script
        (SLURM | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "4000"}, SLURMD, "trains alone"),  # srun --pty
        (SLURM | {"SLURM_PROCID": "0"}, SHELL, "SLURM_NTASKS=2"),  # copied by a shell that outlived the job
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"}, SHELL, "by mpirun -np N"),
        (HYDRA | {"PMI_RANK": "0"}, SHELL, "PMI_SIZE=2"),
        ({"RANK": "0"}, SHELL, "RANK=0 is left over"),
        ({"RANK": "5"}, SHELL, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, SHELL, "MASTER_ADDR, MASTER_PORT not set"),
    ],
)
def test_what_is_left_over_is_told(environment: dict[str, str], names: frozenset[str], words: str) -> None:
    ranks, note = ranks_of(environment, names)
    assert ranks is None
    assert note
    assert words in note
    assert "\n" not in note


@pytest.mark.parametrize(
    ("environment", "names", "words"),
    [
        (OPENMPI, SHELL, "start all by mpirun -np N, or unset OMPI_COMM_WORLD_RANK"),
        (SLURM, SHELL, "SLURM_PROCID=1 of SLURM_NTASKS=2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, SHELL, "MASTER_ADDR, MASTER_PORT not set"),
        (DEEPSPEED | {"RANK": "4"}, SHELL, "RANK=4: of WORLD_SIZE=4"),
        (DEEPSPEED | {"RANK": "x"}, SHELL, "RANK=x: is not a whole number"),
        (DEEPSPEED | {"MASTER_PORT": "tcp"}, SHELL, "MASTER_PORT=tcp"),
        (DEEPSPEED | {"MASTER_PORT": "65536"}, SHELL, "MASTER_PORT=65536: there are ports up to 65535"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": ""}, MPIRUN, "-x MASTER_ADDR=HOST"),
        (HYDRA | {"MPI_LOCALNRANKS": "1"}, {"mpiexec"}, "-genv MASTER_ADDR=HOST"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[3-1]"}, SLURMD, "3-1 is no range"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[1"}, SLURMD, "not a list of hosts"),
        (SAGEMAKER | {"SM_NUM_GPUS": "8"}, SHELL, "torch_distributed"),
        (SAGEMAKER | {"SM_CURRENT_HOST": "algo-3"}, SHELL, "does not name SM_CURRENT_HOST"),
    ],
)
def test_a_rank_that_cannot_be_is_one_line(environment: dict[str, str], names: frozenset[str], words: str) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(words)}[^\n]*$"):
        ranks_of(environment, frozenset(names))


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        (DEEPSPEED, "--master_port=5 after `deepspeed`"),
        (TORCHRUN, "--master-port=5 after `torchrun`"),
        (OPENMPI | {"RANK": "1"}, "mpirun -x MASTER_PORT=5"),
        (PYTORCHJOB, "set MASTER_PORT=5 for all ranks"),
    ],
)
def test_another_port_is_named_in_the_launcher_s_words(environment: dict[str, str], remedy: str) -> None:
    assert remedy in port_remedy(environment, 5)


@given(st.sampled_from([DEEPSPEED, TORCHRUN, OPENMPI, HYDRA, SLURM, SAGEMAKER]), st.data())
def test_whatever_is_missing_no_traceback_and_no_rank_twice(environment: dict[str, str], data: st.DataObject) -> None:
    """Of variables that are missing or nonsense comes a rank, one process, or a line."""
    left = {
        name: data.draw(st.sampled_from([value, "", "x", "1", "2"]), label=name)
        for name, value in environment.items()
        if data.draw(st.booleans())
    }
    try:
        ranks, _ = ranks_of(left, data.draw(st.sampled_from([None, SHELL, MPIRUN, SLURMD])))
    except UserError:
        return
    if ranks:
        assert isinstance(ranks, Ranks)
        assert 0 <= ranks.rank < ranks.world_size
        assert set(ranks.environment) == {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


# Recorded from `scontrol show hostnames` of Slurm 22.05.8
RECORDED = {
    "gpu1": "gpu1",
    "gpu[003-004,7],login1": "gpu003 gpu004 gpu7 login1",
    "gpu[7,9]": "gpu7 gpu9",
    "a1,b[2-3]": "a1 b2 b3",
    "10.0.0.1": "10.0.0.1",
    "rack[0-1]node[2-3]": "rack0node2 rack0node3 rack1node2 rack1node3",
    "r1i[0-1]n[0-2]": "r1i0n0 r1i0n1 r1i0n2 r1i1n0 r1i1n1 r1i1n2",
    "x[09-11]": "x09 x10 x11",
    "a[1-2]b[3,5]c[07-08],d": "a1b3c07 a1b3c08 a2b3c07 a2b3c08 a1b5c07 a1b5c08 a2b5c07 a2b5c08 d",
    "a[1-2]b[3-4,7]c[1,2]": "a1b3c1 a1b3c2 a2b3c1 a2b3c2 a1b4c1 a1b4c2 a2b4c1 a2b4c2 a1b7c1 a1b7c2 a2b7c1 a2b7c2",
    "a[1-2,5]b[3-4]": "a1b3 a1b4 a2b3 a2b4 a5b3 a5b4",
    "a1b[3,5]c[1-2]": "a1b3c1 a1b3c2 a1b5c1 a1b5c2",
    "n[8-011]": "n8 n9 n10 n11",
    "n[3,1]": "n3 n1",
    "n[1]": "n1",
}


@pytest.mark.parametrize("nodelist", RECORDED)
def test_hosts_are_those_of_scontrol(nodelist: str) -> None:
    assert list(hosts_of(nodelist)) == RECORDED[nodelist].split()


def test_what_follows_a_bracket_belongs_to_the_name() -> None:
    """Slurm 22.05 refuses it; others write it."""
    assert list(hosts_of("rack1-[01-02]-ib,b")) == ["rack1-01-ib", "rack1-02-ib", "b"]


def test_the_first_host_of_many_is_found_at_once() -> None:
    assert next(hosts_of("r[0-999]c[0-999]n[0-999]")) == "r0c0n0"


_NAME = st.text(string.ascii_lowercase + "-", min_size=1, max_size=4)
_NUMBERS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=2)


def expanded(item: list[tuple[str, list[str]]]) -> list[str]:
    """The hosts of texts, each followed by its numbers, as Slurm recurs: the last bracket but one comes first."""
    several = [number for number, (_, numbers) in enumerate(item) if len(numbers) > 1]
    if not several:
        return ["".join(text + numbers[0] for text, numbers in item)]
    at = several[-2] if len(several) > 1 else several[0]
    numbers = item[at][1]
    if len(several) == 2:
        pairs = itertools.product(numbers, item[several[1]][1])
        return [f for one, two in pairs for f in expanded(put(put(item, at, one), several[1], two))]
    return [found for one in numbers for found in expanded(put(item, at, one))]


def put(item: list[tuple[str, list[str]]], at: int, number: str) -> list[tuple[str, list[str]]]:
    return [*item[:at], (item[at][0], [number]), *item[at + 1 :]]


_ITEM = st.lists(st.tuples(_NAME, _NUMBERS), min_size=1, max_size=4, unique_by=lambda part: part[0])


@given(st.lists(_ITEM, min_size=1, max_size=3))
def test_hosts_against_slurm_s_recursion(items: list[list[tuple[str, list[tuple[int, int, int]]]]]) -> None:
    """Written out from a structure and read back; `numbers` are (first, how many more, width)."""
    written, expected = [], []
    for item in items:
        firsts = [(name, [(low, f"{low:0{width}}", more) for low, more, width in numbers]) for name, numbers in item]
        written.append(
            "".join(
                f"{name}[{','.join(f'{first}-{low + more}' for low, first, more in ranges)}]" for name, ranges in firsts
            )
        )
        expected += expanded(
            [
                (name, [f"{low + n:0{len(first)}}" for low, first, more in ranges for n in range(more + 1)])
                for name, ranges in firsts
            ]
        )
    assert list(hosts_of(",".join(written))) == expected


@pytest.mark.parametrize("nodelist", ["", "a,,b", "a[", "a]", "[a[1]]", "a[1-]", "a[2-1]", "a b", "a[x-y]", ","])
def test_what_is_no_list_of_hosts_is_refused(nodelist: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR=HOST"):
        list(hosts_of(nodelist))
