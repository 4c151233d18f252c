"""The command line: a few verbs of a Store each, made fit for a shell.

`changing`, `forwarding` and `looking` are the commands, `options` what they are told, `running` how
one works under a lease, `top` the live screen; `terminal` is all that reaches it, `signals` all
that comes from it. Nothing outside imports this but `__main__`, for it needs click and rich.
"""

from .changing import commands, run

__all__ = ["commands", "run"]
