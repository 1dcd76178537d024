"""Starting a training on one machine, on many, or by Slurm: `from launch import main; main(["run=x", "data.path=y"])`.

`python -m launch` builds a safe `deepspeed` command and watches over it; a host is a machine by its name, a node is a
host's part in one start of a run, with an agent and ranks. It looks at the machines before (`preflight`) and at the
processes while they run (`supervise`). Stands on `pretrain` and `cloze`.
"""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from launch.__main__ import main

__all__ = ["main"]
__getattr__ = exports(__name__, {"main": "launch.__main__"})
