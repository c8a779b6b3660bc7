"""The command line: `peftfn train | eval | generate | merge | convert | inspect | demo`.

Each command reads options into plain values and hands them to plain functions. The work is done by the same
`pf.init`, `pf.apply`, `pf.leaves`, `pf.bind`, `pf.save` and `pf.load` that a script calls.
"""

from __future__ import annotations

import sys

from peftfn.cli.errors import UserError, need


def main() -> None:
    """Run the command that `sys.argv` names; wrong input ends with one sentence on stderr and exit code 2."""
    try:
        need("typer")
    except UserError as error:
        print(f"peftfn: {error}", file=sys.stderr)
        sys.exit(2)
    from peftfn.cli.app import app  # typer is an extra: it may be imported only after the check above

    app(prog_name="peftfn")
