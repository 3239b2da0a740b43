"""The public names, for type checkers; `__init__.py` loads them when they are used."""

from qmpcommit.block.chain import Disk as Disk
from qmpcommit.block.chain import Image as Image
from qmpcommit.commit.aftermath import Stall as Stall
from qmpcommit.commit.converge import ConvergeReport as ConvergeReport
from qmpcommit.commit.job import CommitJob as CommitJob
from qmpcommit.commit.outcome import CommitOutcome as CommitOutcome
from qmpcommit.commit.outcome import JobProgress as JobProgress
from qmpcommit.commit.outcome import Timings as Timings
from qmpcommit.commit.pace import Converge as Converge
from qmpcommit.commit.plan import Plan as Plan
from qmpcommit.commit.policy import Abort as Abort
from qmpcommit.commit.policy import Check as Check
from qmpcommit.commit.policy import Hold as Hold
from qmpcommit.commit.policy import Keep as Keep
from qmpcommit.commit.policy import Pivot as Pivot
from qmpcommit.commit.policy import Policy as Policy
from qmpcommit.commit.policy import Ready as Ready
from qmpcommit.commit.policy import Recycle as Recycle
from qmpcommit.errors import ChainError as ChainError
from qmpcommit.errors import CommandRefused as CommandRefused
from qmpcommit.errors import CommitFailed as CommitFailed
from qmpcommit.errors import ConnectError as ConnectError
from qmpcommit.errors import DeadlineExceeded as DeadlineExceeded
from qmpcommit.errors import DiskNotFound as DiskNotFound
from qmpcommit.errors import InvalidRequest as InvalidRequest
from qmpcommit.errors import JobConflict as JobConflict
from qmpcommit.errors import JobNotFound as JobNotFound
from qmpcommit.errors import MonitorBusy as MonitorBusy
from qmpcommit.errors import MonitorLost as MonitorLost
from qmpcommit.errors import NoSpace as NoSpace
from qmpcommit.errors import NotReady as NotReady
from qmpcommit.errors import OnlyIfFailed as OnlyIfFailed
from qmpcommit.errors import PolicyRequired as PolicyRequired
from qmpcommit.errors import ProtocolViolation as ProtocolViolation
from qmpcommit.errors import QmpCommitError as QmpCommitError
from qmpcommit.errors import VMGone as VMGone
from qmpcommit.errors import VMStateError as VMStateError
from qmpcommit.offline_session import offline as offline
from qmpcommit.qmp.events import Event as Event
from qmpcommit.qmp.events import UnknownEvent as UnknownEvent
from qmpcommit.session import Session as Session
from qmpcommit.session import commit as commit

__version__: str
