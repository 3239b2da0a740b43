"""The commands and their exit statuses, for whoever asks what there is; imports nothing."""

from __future__ import annotations

COMMANDS = {
    "vms": ("vms:vms", "The VMs of this host: disks, jobs, windows, and what is wrong."),
    "top": ("top:top", "The same, live, with keys to decide what is READY."),
    "chain": ("chain:chain", "The disks and their backing chains, drawn as a tree."),
    "commit": ("commit:commit", "Commit a disk's overlay into its backing file, and decide."),
    "jobs": ("jobs:jobs", "Block jobs, their phase and progress."),
    "pivot": ("decide:pivot", "End a READY job: the base becomes the active image."),
    "keep": ("decide:keep", "End a READY job: the overlay stays the active image."),
    "abort": ("decide:abort", "Cancel a job by force: the overlay stays the active image."),
    "wait": ("decide:wait", "Wait for a commit that is there already, and decide at READY."),
    "speed": ("steering:speed", "Change how fast a job copies."),
    "pause": ("steering:pause", "Have a job copy nothing for a while."),
    "resume": ("steering:resume", "Have a paused job go on."),
    "snapshot": ("snapshot:snapshot", "Lay overlays that stay over disks, at one instant."),
    "window": ("window:window", "Run a command while disks' files stand still, then merge away."),
    "cycle": ("cycle:cycle", "Carry an overlay's changes into its base, or throw them away."),
    "flatten": ("window:flatten", "Bring a long chain down to few layers."),
    "recover": ("recover:recover", "Put right what a death has left: says what, then does it."),
    "doctor": ("doctor:doctor", "What is wrong with VMs, a verdict each, and what to type."),
    "daemon": ("daemon:daemon", "The daemon: many VMs, over HTTP, across restarts."),
    "ui": ("ui:ui", "The daemon's page in a browser: VMs, chains and commits as they change."),
    "demo": ("demo:demo", "The main job on a throw-away chain, start to end, with proof."),
    "explain": ("explain:explain", "Draw what a story does to a disk's files."),
    "help": ("help:help_", "The manual: its topics, or one of them."),
    "completion": ("completion:completion", "What completes its words in bash, zsh or fish."),
}
"""Name, home in this package, and the line in the list of commands."""

NO_DAEMON = {
    "doctor": "it asks the monitors themselves: give the paths of the VMs' monitors in the place of"
    " their names, without --daemon",
    "daemon": "it is the daemon itself",
    "demo": "it makes a VM of its own",
    "help": "it comes with the program",
    "completion": "it is the same for all",
    "flatten": "give the path of the VM's monitor in the place of its name, without --daemon; or"
    " have the daemon's configuration say it, in a [[flatten]] rule",
    "recover": "give the paths of the VMs' monitors in the place of their names, without --daemon;"
    " what is the daemon's own it recovers when it starts",
}
"""Commands that are not done through a daemon, and what to do instead; all others are."""

STATUSES = """\
Exit status:
  0    done as asked
  1    failed, nothing lost
  2    wrong usage; a missing policy is this
  3    decided otherwise: an --only-if or --check failed, a hold ran out,
       another client was first
  4    VM, disk or job not found
  5    a pivot or keep before READY
  130  interrupted: the job is cancelled first; a second Ctrl-C leaves it
       running and says how to take it up again
"""

COMPLETIONS = {
    "bash-completion/completions/qmpcommit": 'eval "$(qmpcommit completion bash)"\n',
    "zsh/site-functions/_qmpcommit": (
        '#compdef qmpcommit\neval "$(qmpcommit completion zsh)"\n_qmpcommit_completion "$@"\n'
    ),
    "fish/vendor_completions.d/qmpcommit.fish": "qmpcommit completion fish | source\n",
}
"""What a wheel installs below ``share``, for the shells that look there."""

WITHOUT = """\
Usage: qmpcommit [OPTIONS] COMMAND [ARGS]...

  Live block commit over QMP, both phases of it.

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
{commands}

{statuses}
The package {missing} is not installed, so nothing but this can be said here:
pip install 'qmpcommit[cli]'
"""


def help_without(missing: str) -> str:
    """What ``--help`` says where a package is missing that draws it better."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return WITHOUT.format(commands="\n".join(lines), statuses=STATUSES, missing=missing)
