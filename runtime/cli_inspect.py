"""The commands of `dsrun` that only look: report, verify, info."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table

from dscompile.runtime.artifact import read_manifest, verify_artifact
from dscompile.runtime.command import EXIT_FAILED, print_json
from dscompile.runtime.errors import UserError
from dscompile.runtime.report import Report, read_report
from dscompile.runtime.report_html import write_html
from dscompile.runtime.report_text import format_bytes, print_report, verification_line


def report(args: argparse.Namespace) -> int:
    """Print the fusion report, or write it as one page."""
    data = read_report(args.artifact)
    if args.html:
        write_html(data, args.html)
        if not args.json:
            print(f"wrote {args.html}")
    if args.json:
        print_json(data.to_json())
    elif not args.html:
        print_report(data)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check every file against the manifest and the plan against the weights; with --against, the numbers too."""
    manifest = verify_artifact(args.artifact, full=True)
    result = {"artifact": str(args.artifact), "files": len(manifest.files), "status": "passed"}
    if not args.against:
        if args.json:
            print_json(result)
        else:
            print(f"{args.artifact}: {len(manifest.files)} files, all as they were written, and consistent")
        return 0
    if find_spec("transformers") is None:
        raise UserError("--against needs the compiler; run: pip install 'dscompile[compiler]'")
    # Not a plain import statement: nothing in the runtime may depend on the compiler.
    outcome = import_module("dscompile.compiler.verify").verify_against(args.artifact, args.against)
    if args.json:
        print_json({**result, "verification": Report(classes=(), verification=outcome).to_json()["verification"]})
    else:
        print(verification_line(outcome))
        for check in outcome.checks:
            print(f"  {check.name}  {check.error:.2e}  limit {check.limit:.2e}  {'ok' if check.passed else 'MISS'}")
    return 0 if outcome.status == "passed" else EXIT_FAILED


def info(args: argparse.Namespace) -> int:
    """Print what the manifest says."""
    manifest = read_manifest(args.artifact)
    facts = manifest.summary()
    size = sum(entry.size for entry in manifest.files.values())
    if args.json:
        print_json({**facts, "bytes": size})
        return 0
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0), pad_edge=False)
    for key, value in {**facts, "size": format_bytes(size)}.items():
        table.add_row(f"[dim]{key.replace('_', ' ')}[/dim]", _shown(value))
    Console().print(table)
    return 0


def _shown(value: object) -> str:
    """A fact as a person writes it: no brackets, no quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
