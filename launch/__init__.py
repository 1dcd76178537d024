"""Starting training: `python -m launch` builds a safe `deepspeed` command and watches over it."""
