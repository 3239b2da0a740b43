"""What to do when a commit is READY: policies, as values that travel through JSON.

What no policy can do: at READY the base **already holds** the overlay's data, whatever is
decided. A test of whether the changes deserve to be committed at all runs before the commit
(``only_if``), not in a policy.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeAlias,
    cast,
)

from qmpcommit.block.chain import Image
from qmpcommit.callback import ask
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.errors import ChainError, CommitFailed, InvalidRequest, PolicyRequired
from qmpcommit.tasks import kill
from qmpcommit.units import parse_seconds
from qmpcommit.values import Record, record


class PolicyValue(Record):
    """Base of all policies that are values, so that ``[Keep(), Pivot()]`` is a list of policies.

    What matters of them elsewhere is said here once: what one `leaves` as the image that the guest
    writes to (None where that is not decided yet), whether it is `held` READY until somebody
    decides, and whether it `runs` a command, which is told the names of files.
    """

    leaves: ClassVar[Literal["base", "overlay", "fresh"] | None] = None
    held: ClassVar[bool] = False
    runs: ClassVar[bool] = False

    @property
    def ends(self) -> tuple[Decision, ...]:
        """What it may come to by itself."""
        return ()

    def rest(self, passed: float) -> Self:
        """What is left of it, so many seconds after READY."""
        return self

    if TYPE_CHECKING:

        @property
        def kind(self) -> str:
            """Which policy it is, as its JSON says."""


class DecisionValue(PolicyValue):
    """Base of those that are a decision."""

    @property
    def ends(self) -> tuple[Decision, ...]:
        """Itself."""
        return (cast("Decision", self),)


@record
class Pivot(DecisionValue):
    """Make the base the active image (``job-complete``); the overlay is invalid from then on."""

    leaves = "base"
    kind: Literal["pivot"] = field(default="pivot", kw_only=True)


@record
class Keep(DecisionValue):
    """Keep the overlay active (``block-job-cancel`` with ``force: false``).

    The base then holds everything up to that instant. QEMU leaves the overlay's clusters
    allocated, so the next commit copies them again.
    """

    leaves = "overlay"
    kind: Literal["keep"] = field(default="keep", kw_only=True)


@record
class Abort(DecisionValue):
    """Cancel the job by force: the overlay stays active, the base is half-written or ahead."""

    leaves = "overlay"
    kind: Literal["abort"] = field(default="abort", kw_only=True)


@record
class Recycle(DecisionValue):
    """Pivot, then lay a fresh empty overlay (a new file) over the base, the guest paused meanwhile.

    The new overlay holds *only the changes since*, which a keep's does not. `overlay` is the
    file name, as QEMU is to open it; the file must not exist. It is like the overlay that it
    follows; what QEMU does not tell of that is said in `overlay_options`, which are members of
    ``blockdev-add`` (for its protocol node in ``file``), and `overlay_secret` is the id of the
    QEMU secret that the fresh overlay of an encrypted disk is encrypted with.
    """

    leaves = "fresh"
    overlay: str
    overlay_options: Mapping[str, Any] | None = None
    overlay_secret: str | None = None
    kind: Literal["recycle"] = field(default="recycle", kw_only=True)

    @property
    def asked(self) -> OverlayOptions:
        """What is asked of the fresh overlay."""
        return OverlayOptions.of(self.overlay_options, self.overlay_secret)

    def __post_init__(self) -> None:
        if not isinstance(self.overlay, (str, os.PathLike)) or not os.fspath(self.overlay):
            raise InvalidRequest(f"a recycle needs its overlay's file name, not {self.overlay!r}")
        object.__setattr__(self, "overlay", os.fspath(self.overlay))
        if "\0" in self.overlay:
            raise InvalidRequest("a file name can't contain a NUL byte")
        OverlayOptions.of(self.overlay_options, self.overlay_secret)


Decision: TypeAlias = Pivot | Keep | Abort | Recycle
"""What a policy comes to in the end."""


def ends_of(policy: object) -> tuple[Decision, ...]:
    """What a policy may come to by itself; nothing is known of a caller's own."""
    return policy.ends if isinstance(policy, PolicyValue) else ()


def fresh_of(policy: object) -> list[Recycle]:
    """The fresh overlays that a policy may lay by itself."""
    return [end for end in ends_of(policy) if isinstance(end, Recycle)]


def _check_decision(value: object, what: str) -> None:
    """Refuse what could not be done at READY: the job would stay there for ever."""
    if not isinstance(value, Decision):
        raise InvalidRequest(
            f"{what} is what is done in the end, Pivot(), Keep(), Abort() or Recycle(...), not"
            f" {value!r}"
        )


@record
class Hold(PolicyValue):
    """Stay READY until the caller (or another client) decides; after `timeout` s, `otherwise`."""

    held = True
    timeout: float | None = None
    otherwise: Decision = Keep()
    kind: Literal["hold"] = field(default="hold", kw_only=True)

    @property
    def ends(self) -> tuple[Decision, ...]:
        """What is done when its time is over."""
        return (self.otherwise,)

    def rest(self, passed: float) -> Hold:
        """The same with less time; a clock that was set back does not lengthen it."""
        if self.timeout is None:
            return self
        left = max(0.0, self.timeout - max(0.0, passed))
        return Hold(timeout=left, otherwise=self.otherwise)

    def __post_init__(self) -> None:
        if self.timeout is not None:
            parse_seconds(self.timeout, "hold's timeout")
        _check_decision(self.otherwise, "Hold's otherwise")


@record
class Check(PolicyValue):
    """Run a command at READY; its exit status decides between `passed` (0) and `failed`.

    The command learns the commit from the variables ``QMPCOMMIT_VM``, ``_DISK``, ``_JOB``,
    ``_BASE``, ``_TOP`` (file names), ``_BASE_NODE`` and ``_TOP_NODE``. What it prints goes to
    standard error. After `timeout` seconds it is killed and has failed. One that could not be run
    (exit status 126 or 127) or that a signal ended (128 and above) has decided nothing: the job is
    aborted, and the commit fails.
    """

    runs = True
    command: Sequence[str]
    timeout: float = 60.0
    passed: Decision = Pivot()
    failed: Decision = Keep()
    kind: Literal["check"] = field(default="check", kw_only=True)

    @property
    def ends(self) -> tuple[Decision, ...]:
        """What its command decides between."""
        return (self.passed, self.failed)

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", check_command(self.command, "Check"))
        parse_seconds(self.timeout, "check's timeout")
        _check_decision(self.passed, "Check's passed")
        _check_decision(self.failed, "Check's failed")


CANNOT_TELL = 126
"""From this exit status on a command has not answered: it was not found, or a signal ended it."""

AnyPolicy: TypeAlias = Pivot | Keep | Abort | Recycle | Hold | Check
"""Every policy that is a value; `Policy` is the same with its JSON discriminator."""

PolicyCall: TypeAlias = Callable[["Ready"], Awaitable[PolicyValue]]
"""An embedder's own policy: asked once, at READY."""

AskedPolicy: TypeAlias = PolicyValue | PolicyCall | dict[str, Any] | str
"""What ``policy=`` takes: a policy, its dict, its JSON text, or a callable of one's own."""

KINDS: Mapping[str, type[AnyPolicy]] = {
    "pivot": Pivot,
    "keep": Keep,
    "abort": Abort,
    "recycle": Recycle,
    "hold": Hold,
    "check": Check,
}

if TYPE_CHECKING:
    from pydantic import ValidationError

    Policy: TypeAlias = AnyPolicy


def __getattr__(name: str) -> Any:
    if name == "Policy":
        from pydantic import Field

        return Annotated[AnyPolicy, Field(discriminator="kind")]
    raise AttributeError(name)


@record
class Ready(Record):
    """What a policy is told: which commit has reached its second phase.

    `bytes_committed` is what was copied so far.
    """

    vm: str
    disk: str
    job_id: str
    base: Image
    top: Image
    bytes_committed: int = 0

    def environment(self) -> dict[str, str]:
        """The ``QMPCOMMIT_*`` variables that a command learns this from.

        Raises `ChainError` where it would be told another file's name.
        """
        check_told(self.vm, self.base, self.top)
        return {
            "QMPCOMMIT_VM": self.vm,
            "QMPCOMMIT_DISK": self.disk,
            "QMPCOMMIT_JOB": self.job_id,
            "QMPCOMMIT_BASE": self.base.handed_out,
            "QMPCOMMIT_TOP": self.top.handed_out,
            "QMPCOMMIT_BASE_NODE": self.base.node_name,
            "QMPCOMMIT_TOP_NODE": self.top.node_name,
        }


def check_told(vm: str, *images: Image) -> None:
    """Raise `ChainError` where an image's name is another file's here, for a command to find."""
    for image in images:
        if image.astray and os.path.lexists(image.filename):
            raise ChainError(
                f"a command would be told {image.filename} for a layer of {vm}, and would find"
                f" another file under that name: {image.astray}. It was not run",
                vm=vm,
            )


class Settled(NamedTuple):
    """A decision and who made it: ``policy``, ``check passed``, ``check failed``, ..."""

    decision: Decision
    by: str


def check_command(command: Sequence[str] | str, what: str) -> tuple[str, ...]:
    """A command as a tuple of arguments, refused where it could not be run."""
    if isinstance(command, (str, bytes)) or not isinstance(command, Sequence):
        raise InvalidRequest(f"{what} takes a command as a list of arguments, not {command!r}")
    words = tuple(command)
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise InvalidRequest(f"{what} needs a command: a list of at least one text without NUL")
    return words


def parse_policy(value: object) -> AnyPolicy | PolicyCall:
    """A policy from what a caller gave: a policy, its dict, its JSON text, or a callable.

    Raises `PolicyRequired` for None and `InvalidRequest` for anything that is no policy.
    """
    if value is None:
        raise PolicyRequired(
            "committing the active layer has two phases, and nothing says what to do in the"
            " second: give a policy, a pivot to make the base the active image, or a keep to keep"
            " writing to the overlay. Nothing was sent",
            hint="--pivot and --keep-overlay say that",
        )
    if isinstance(value, AnyPolicy):
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"""the policy is no JSON ({error}); write for example {{"kind": "pivot"}}"""
            ) from None
        if not isinstance(value, Mapping):
            raise InvalidRequest(
                """the policy is no object of JSON; write for example {"kind": "pivot"}"""
            )
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if isinstance(value, type) and issubclass(value, Record):
        raise InvalidRequest(f"give a policy, {value.__name__}(), not its class {value.__name__}")
    if callable(value):
        return value
    raise InvalidRequest(
        f"{value!r} is no policy; give Pivot(), Keep(), Abort(), Hold() or Check()"
    )


def _from_mapping(value: Mapping[Any, Any]) -> AnyPolicy:
    kind = KINDS.get(value.get("kind")) if isinstance(value.get("kind"), str) else None  # type: ignore[arg-type]
    if kind is None:
        raise InvalidRequest(
            f"a policy's kind is one of {', '.join(KINDS)}, not {value.get('kind')!r}"
        )
    from pydantic import ValidationError

    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise InvalidRequest(f"the policy {value['kind']} is wrong{_wrong(error)}") from None


def _wrong(error: ValidationError) -> str:
    """Where, and what; of a decision in it only as the kind that it says it is."""
    found = error.errors()
    others = {each["loc"][:-1] for each in found if each["type"] == "literal_error"}
    told = [each for each in found if not any(each["loc"][: len(o)] == o for o in others)]
    if not told:
        where = found[0]["loc"][0]
        return f" at {where}: its kind is one of pivot, keep, abort, recycle"
    what = told[0]["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in told[0]["loc"])
    return f" at {where}: {what}" if where else f": {what}"


def immediate(policy: AnyPolicy | PolicyCall) -> Settled | None:
    """The decision of a policy that needs no time to come to it."""
    return Settled(policy, "policy") if isinstance(policy, Decision) else None


async def settle(policy: AnyPolicy | PolicyCall, ready: Ready) -> Settled:
    """Come to a decision; raises `Failed` where an embedder's policy does not answer."""
    if isinstance(policy, Hold):
        if policy.timeout is None:
            await asyncio.get_running_loop().create_future()  # until somebody decides for us
        await asyncio.sleep(policy.timeout or 0)
        return Settled(policy.otherwise, "hold expired")
    if isinstance(policy, Check):
        status = await run_command(policy.command, ready.environment(), policy.timeout)
        if status == 0:
            return Settled(policy.passed, "check passed")
        if is_answer(status):
            return Settled(policy.failed, "check failed")
        raise CommitFailed(
            f"its check {' '.join(policy.command)} {no_answer(status)}, which decides nothing"
        )
    if isinstance(policy, AnyPolicy):
        return Settled(policy, "policy")
    answer = await ask(policy, ready)
    if not isinstance(answer, AnyPolicy):
        was = answer.__name__ if isinstance(answer, type) else f"{answer!r:.200}"
        what = "the class " if isinstance(answer, type) else ""
        raise InvalidRequest(
            f"the policy answered {what}{was}; it must answer Pivot(), Keep(), Abort(),"
            " Recycle(...), Hold() or Check(...)",
            vm=ready.vm,
            disk=ready.disk,
            job_id=ready.job_id,
        )
    return await settle(answer, ready)


def is_answer(status: int | None) -> bool:
    """Whether a command has answered at all; None, a time-out, is for the caller to judge."""
    return status is None or 0 <= status < CANNOT_TELL


def no_answer(status: int | None) -> str:
    """How a command ended that has not answered, in words."""
    why = {126: " (it could not be run)", 127: " (it was not found)"}
    killed = status is not None and (status < 0 or status > 128)
    return f"ended with status {status}" + (
        " (a signal ended it)" if killed else why.get(status or 0, "")
    )


async def run_command(
    command: Sequence[str], environment: Mapping[str, str], timeout: float
) -> int | None:
    """Run a command in a process group of its own; None where it had to be killed for its time.

    What it prints goes to our standard error, since standard output may be a program's JSON.
    Raises OSError where it can't be started. A cancellation kills it too.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        await kill(process, group=True)
