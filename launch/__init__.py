"""Starting training: `python -m launch` builds a safe `deepspeed` command and watches over it.

A host is a machine by its name; a node is a host's part in one start of a run, and has an agent and ranks.
"""
