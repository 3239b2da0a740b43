"""What help shows of a command: its options in sections, and examples of it."""

from __future__ import annotations

import os
import stat

import click

SECTIONS = {
    "Decision": (
        *("pivot", "keep_overlay", "recycle", "abort", "hold", "check", "policy"),
        *("only_if", "detach", "until", "choice", "waits", "decide", "keep_if", "guest"),
    ),
    "Layers": (
        *("others", "base", "top", "shallow", "keep", "keep_relative", "backing_mask_protocol"),
        *("filter_node_name", "no_bitmaps"),
    ),
    "Safety": (
        *("dry_run", "yes", "timeout", "freeze", "agents", "hold_limit", "override", "close"),
        *("on_error", "bandwidth", "converge"),
    ),
    "Files": (
        *("stale", "delete", "rename", "on_pivot", "overlay", "overlay_dir", "folders"),
        *("overlay_options", "overlay_secret", "offline", "config", "keep_files"),
    ),
    "Output": ("dot", "columns", "watch", "progress", "as_json", "quiet", "verbose", "help"),
}
"""The options by their names; any other one is under *Options*, before these."""

VM = "/run/vms/web1/qmp.sock"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "vms": ("vms", "vms '/run/vms/*/qmp.sock' --watch", "vms '/run/vms/web*/*.sock' --json"),
    "top": ("top", "top '/run/vms/*/qmp.sock'", "--daemon top 'web*'"),
    "chain": (f"chain {VM}", f"chain {VM} vda --json", f"chain {VM} --dot"),
    "commit": (
        f"commit {VM} vda --pivot --delete",
        f"commit {VM} vda --keep-overlay --bandwidth 50MiB",
        f"commit {VM} vda --recycle /vms/web1/fresh.qcow2",
        f"commit {VM} vda --pivot --dry-run",
        f"commit {VM} vda --top 2 --shallow",
        f"commit {VM} vda vdb --pivot",
        "--daemon commit web1 vda --pivot",
    ),
    "jobs": (f"jobs {VM}", f"jobs {VM} --watch", f"jobs {VM} --format disk,percent,eta,job"),
    "pivot": (f"pivot {VM} qmpcommit-vda-1a2b3c4d --wait --delete",),
    "keep": (f"keep {VM} qmpcommit-vda-1a2b3c4d",),
    "abort": (f"abort {VM} qmpcommit-vda-1a2b3c4d",),
    "wait": (
        f"wait {VM} qmpcommit-vda-1a2b3c4d --then pivot",
        f"wait {VM} qmpcommit-vda-1a2b3c4d --until ready --timeout 10min",
    ),
    "speed": (
        f"speed {VM} qmpcommit-vda-1a2b3c4d 50MiB",
        f"speed {VM} qmpcommit-vda-1a2b3c4d max",
    ),
    "pause": (f"pause {VM} qmpcommit-vda-1a2b3c4d",),
    "resume": (f"resume {VM} qmpcommit-vda-1a2b3c4d",),
    "snapshot": (
        f"snapshot {VM} vda",
        f"snapshot {VM} vda vdb --freeze pause --overlay /vms/web1/",
    ),
    "window": (
        f"window {VM} vda -- cp {{vda}} /backup/",
        f"window {VM} vda vdb --freeze pause -- tar -cf /backup/web1.tar {{vda}} {{vdb}}",
        f"window --close {VM}",
    ),
    "cycle": (
        f"cycle {VM} vda --keep-if ./is-it-good --reset --delete",
        f"cycle {VM} vda vdb --keep-if ./is-it-good --stop",
    ),
    "flatten": (f"flatten {VM} vda --keep 2 --delete",),
    "recover": (f"recover {VM}", f"recover {VM} --decide keep --yes"),
    "doctor": (f"doctor {VM}", "doctor --all", "doctor --all --json"),
    "daemon": ("daemon --config /etc/qmpcommit/config.toml --check-config",),
    "ui": ("ui", "ui --no-browser --port 8080"),
    "demo": ("demo", "demo --storage-daemon --keep-files"),
    "explain": ("explain recycle", f"explain pivot {VM} vda", f"explain group {VM} vda vdb"),
    "help": ("help", "help concepts", "help virsh"),
    "completion": ("completion bash > /etc/bash_completion.d/qmpcommit",),
}
"""Of each command, as they are typed after ``qmpcommit``."""

_MONITORS = {"qmp", "qmps", "words"}
"""The first argument of a command that takes a monitor."""


class Command(click.Command):
    """A command whose help has sections and examples, and whose QMP may be ``$QMPCOMMIT_QMP``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the monitor of the environment where none is given."""
        usual = os.environ.get("QMPCOMMIT_QMP")
        if usual and self._leaves_out(ctx, args):
            args = [usual, *args]
        return super().parse_args(ctx, args)

    def _leaves_out(self, ctx: click.Context, args: list[str]) -> bool:
        """Whether the words are for a command without its QMP."""
        names = [each for each in self.params if isinstance(each, click.Argument)]
        if not names or names[0].name not in _MONITORS or "--offline" in args:
            return False
        if ctx.find_root().params.get("daemon") is not None:
            return False  # which knows its VMs by their names
        try:
            given, *_ = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:
            return False  # it is said where the words are parsed
        if given.get("everything"):
            return False
        words: list[str] = []
        for each in names:
            value = given.get(str(each.name))
            if isinstance(value, str):
                words.append(value)
            elif isinstance(value, (tuple, list)):
                words += [word for word in value if isinstance(word, str)]
        if all(each.nargs == 1 and each.required for each in names):
            return len(words) < len(names)
        return not words or not _is_monitor(words[0])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by what they are for."""
        places = {name: section for section, names in SECTIONS.items() for name in names}
        found: dict[str, dict[str, tuple[str, str]]] = {"": {}, **{name: {} for name in SECTIONS}}
        for each in self.get_params(ctx):
            record = None if isinstance(each, click.Argument) else each.get_help_record(ctx)
            if record is not None:
                name = "help" if "--help" in each.opts else str(each.name)
                found[places.get(name, "")][record[0]] = record
        for section, records in found.items():
            if records:
                with formatter.section(section or "Options"):
                    formatter.write_dl(list(records.values()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples."""
        with formatter.section("Examples"):
            for line in EXAMPLES.get(ctx.info_name or "", ()):
                formatter.write(f"{'':{formatter.current_indent}}qmpcommit {line}\n")


def _is_monitor(word: str) -> bool:
    """Whether a first word can be nothing but an address (or an address and a disk)."""
    path, _, _ = word.removeprefix("unix:").partition(":")
    if word.startswith(("tcp:", "unix:")) or path.endswith(".sock"):
        return True
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
