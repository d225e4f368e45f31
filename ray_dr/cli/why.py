"""`ray-dr why JOB`."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, assert_never

import click

from ray_dr.cli.main import INTERRUPTED, exit_status
from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.timeline import expected
from ray_dr.cli.words import duration, print_json, short
from ray_dr.detection.classify import Diagnosis
from ray_dr.detection.taxonomy import FAULTS
from ray_dr.errors import ConfigError, JobFailed
from ray_dr.model.actions import (
    AbortGroup,
    Action,
    CloseJob,
    FormGroup,
    KillWorker,
    ReleaseNode,
    RequestNodes,
    Rescue,
    SaveFinal,
    StartWorkers,
    StopGroup,
    TakeInventory,
)
from ray_dr.model.codec import to_json
from ray_dr.model.journal import Record
from ray_dr.model.recovery import Failed, FailureKind
from ray_dr.model.signal import FaultKind, Subject
from ray_dr.recovery.why import Account, Ended, Going, Story, Waiting, tell
from ray_dr.recovery.words import count
from ray_dr.telemetry.preemptions import in_words, preemptions

WIDTH, LABEL = 120, 12
NAMED, TRIED, OTHERS = 4, 12, 20
EVIDENCE = 280
PHASES = {
    "noticed": "noticed", "decided": "decided", "unwound": "survivors out of the step", "found": "version found",
    "capacity": "nodes there", "provisioned": "group formed", "fetched": "state fetched", "loaded": "loaded",
    "first_step": "first step",
}  # fmt: skip
LOOKING, FOUND = "; looking for the newest version", re.compile(r"^step \d+ of attempt \d+ can be restored; (?=attempt )")
"""What the same line says once more."""
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(ms|s|min|h|d)\b)")
K = FaultKind


@click.command("why")
@job_argument
@click.option("--incident", "number", type=int, metavar="N", help="Only this one, in full; 1 is the job's first.")
@click.option("--last", is_flag=True, help="Only the newest one.")
def command(job: str, store: str | None, as_json: bool, number: int | None, last: bool) -> None:
    """What happened to a job, how it was known, what was tried, what it cost, and what to do.

    The newest incident in full, the others as a line each. Seconds with a plus sign count from the moment the failure began.
    """
    if last and number is not None:
        raise ConfigError("it is either --incident N or --last", remedy="leave one out", key="--incident")
    found = find_job(job, store)
    records = found.records()
    story = tell(records)
    if story is None:
        raise ConfigError(
            f"the journal of job {found.name!r} in {found.store.url} holds no decision",
            remedy="only a job that was run with ray-dr run or ray_dr.run has one", key="JOB",
        )  # fmt: skip
    shown = _choose(found.name, story.accounts, number, last)
    now = time.time()
    if as_json:
        print_json({**as_dict(found.name, story, shown, now=now), "preemptions": to_json(preemptions(records))})
        return
    full = [describe(account, story, now=now) for account in shown[:1]]
    rest = [] if number is not None or last else list(_lines(shown[1:], story, now))
    head = [] if number is not None else [standing(found.name, story, now=now), *announced(records)]
    click.echo("\n\n".join([*head, *full, *(["\n".join(rest)] if rest else [])]))


def announced(records: Iterable[Record]) -> Iterator[str]:
    """The preemptions, which are no failures where there was time enough: a line each."""
    lines = [f"node {short(one.node)}, at {_when(one.at)}: {in_words(one)}" for one in preemptions(records)]
    if lines:
        yield "\n".join([f"{count(len(lines), 'preemption')}:", *(f"  {line}" for line in lines[-OTHERS:])])


def _choose(name: str, accounts: Sequence[Account], number: int | None, last: bool) -> Sequence[Account]:
    """The incidents asked for, the newest first. Raises ConfigError for a number that none has."""
    if number is None:
        return accounts[:-2:-1] if last else accounts[::-1]
    if not 1 <= number <= len(accounts):
        there = {0: "it had none", 1: "there is only incident 1"}.get(len(accounts), f"there are 1 to {len(accounts)}")
        raise ConfigError(f"job {name!r} has no incident {number}", remedy=there, key="--incident")
    return (accounts[number - 1],)


# ------------------------------------------------------------------------------------------------- where the job stands


def standing(name: str, story: Story, *, now: float) -> str:
    """Where the job stands, and what there is to do about it; `now` in UTC seconds."""
    rows: list[tuple[str, str]] = []
    match story.standing:
        case Going() as going:
            heard = duration(max(0.0, now - story.heard_at))
            what = f"{going.phase} since {_when(going.since)}, last word {heard} ago"
        case Waiting() as waiting:
            what = f"{waiting.phase}, waits since {_when(waiting.since)}, for {duration(max(0.0, now - waiting.since))}"
            rows = [("waits for", needed(waiting)), ("to do", advice(waiting))]
        case Ended() as ended:
            how = "failed" if isinstance(ended.phase, Failed) else "stopped on request" if ended.phase.drained else "finished"
            what = f"{how} at {_when(ended.at)}"
            if code := exit_code(name, ended):
                rows = [("why", short(_cut(ended.reason))), ("exit code", f"{code}: {resubmit(ended)}")]
            if isinstance(ended.phase, Failed):
                rows.append(("to do", remedy_at_end(ended)))
        case _ as never:
            assert_never(never)
    return "\n".join([f"job {name}, step {story.step}: {what}", *_rows([("in all", _toll(story, now)), *rows])])


def needed(waiting: Waiting) -> str:
    """What a job waits for, in words."""
    if not waiting.need:
        return "nodes; how many, its journal does not say in words of this version"
    each = f" with {count(waiting.workers, 'worker')} up on each" if waiting.workers else " with a worker up"
    text = f"{count(waiting.need, 'node')}{each}: {waiting.have} there"
    if waiting.have >= waiting.need:
        text = f"{text}, and looks for what there is to go on from"
    if waiting.asked:
        text = f"{text}; the cluster was asked for {waiting.asked} in all"
    failing = (f"on node {node} {count(times, 'start')} of a worker in a row failed" for node, times in waiting.failing.items())
    return "; ".join([text, *failing])


def advice(waiting: Waiting) -> str:
    """What can be done for a job that waits."""
    missing = waiting.need - waiting.have
    if waiting.failing:
        return "look into the workers' logs on the nodes named: the program may not start there at all"
    if missing <= 0:
        return "nothing, it goes on in a moment" if waiting.need else "see `ray status` for what keeps the autoscaler"
    if not waiting.have:
        return f"give the cluster {count(missing, 'node')}; `ray status` tells what keeps the autoscaler"
    key = "workers.min_nodes_to_run" if waiting.phase == "suspended" else "workers.nodes"
    return f"give the cluster {count(missing, 'node')} more, or lower {key} to {waiting.have} and run it again"


def exit_code(name: str, ended: Ended) -> int:
    """Exit status of `ray-dr run` for how the job ended."""
    if isinstance(ended.phase, Failed):
        return exit_status(JobFailed(name, ended.reason, resubmit=ended.phase.resubmit))
    return INTERRUPTED if ended.phase.drained else 0


def resubmit(ended: Ended) -> str:
    """Whether to run the job again."""
    if isinstance(ended.phase, Failed):
        return "running it again continues it" if ended.phase.resubmit else "do not resubmit, it would fail the same way"
    return "running it again continues it" if ended.phase.drained else "nothing is left to do"


def remedy_at_end(ended: Ended) -> str:
    """What to do about a job that failed."""
    if ended.diagnosis is not None:
        return FAULTS[ended.diagnosis.kind].remedy
    if isinstance(ended.phase, Failed) and not ended.phase.resubmit:
        return "nothing here: look at the supervisor that owns the job now"
    return "see the incidents for what came in the way, then run it again"


def _toll(story: Story, now: float) -> str:
    if not story.accounts:
        return "no incidents"
    without_s = sum(without_step_s(account, story, now) for account in story.accounts)
    lost = count(sum(account.report.steps_lost for account in story.accounts), "step")
    so_far = "" if isinstance(story.standing, Ended) or story.accounts[-1].over_at is not None else " so far"
    return f"{count(len(story.accounts), 'incident')}, {duration(without_s)} without a step, {lost} lost{so_far}"


# -------------------------------------------------------------------------------------------------------- one incident


def describe(account: Account, story: Story, *, now: float) -> str:
    """One incident in full."""
    rows = [
        *(("set aside", text) for text in _set_aside(account.diagnosis)),
        *(("besides", _cut(finding.evidence)) for finding in account.diagnosis.besides[:NAMED]),
        *_after(account, [("known by", at, text) for at, text in known_by(account)]),
        ("counts", counts(account)),
        *_after(account, [("tried", at, text) for at, text in tried(account)]),
        *(("cost", text) for text in cost(account, story, now=now)),
        ("to do", to_do(account, story)),
    ]
    return "\n".join([*_wrapped(_title(account), "    "), *_rows(rows)])


def happened(account: Account) -> str:
    """The root cause in one sentence."""
    diagnosis, incident = account.diagnosis, account.report.incident
    who = _who(diagnosis.subjects)
    error = _cut(diagnosis.root.error)
    if incident.kind is FailureKind.START_TIMEOUT and not diagnosis.subjects:
        return f"{incident.subject} did not begin: {incident.detail}"
    match diagnosis.kind:
        case K.PREEMPTION:
            return f"{who} was taken away, as had been announced"
        case K.NODE_GONE:
            return f"{who} was lost"
        case K.NODE_FROZEN:
            return f"{who} froze: nothing came from it over an open connection"
        case K.NETWORK_CUT:
            return f"{who} was cut off from the network"
        case K.GPU_FAULT:
            return f"a GPU failed on {who}"
        case K.GPU_MISUSE:
            return f"the program misused a GPU on {who}"
        case K.OUT_OF_MEMORY:
            return f"{who} ran out of memory"
        case K.PROCESS_GONE:
            return f"the process of {who} ended"
        case K.EXCEPTION:
            return f"{who} raised {error}"
        case K.PROGRAM_ERROR:
            return f"{who} raised {error}, as it had before at the same step"
        case K.COLLECTIVE_BROKEN:
            return f"the group broke, and nobody is known to have ended: {_cut(incident.detail)}"
        case K.HANG:
            return f"{who} stopped getting on"
        case K.STRAGGLER:
            return f"{who} was slower than the others"
        case K.NON_FINITE if not diagnosis.subjects:
            return "training met numbers that are not finite, step after step"
        case K.NON_FINITE:
            return f"{who} had numbers that are not finite"
        case K.LOSS_SPIKE:
            return "the loss jumped, and did not come back"
        case K.CORRUPTION if incident.kind is FailureKind.CORRUPTION and "/" not in incident.subject:
            return f"replicas came to differ, and nobody can tell which is wrong: {who}"
        case K.CORRUPTION:
            return f"{who} held wrong parameters"
        case K.STORAGE:
            return f"a store gave {who} trouble"
        case K.PREFLIGHT:
            return f"{who} was found bad when it came"
        case _ as never:
            assert_never(never)


def known_by(account: Account) -> Iterator[tuple[float, str]]:
    """(UTC seconds, in words) of the first witness, of what gave the cause away if that was another, and of the decision."""
    root, first = account.diagnosis.root, account.first
    said = [(first.at, f"{_cut(first.evidence)} ({first.detector})"), (account.decided_at, "the job's supervisor decided to act")]
    if root.evidence != first.evidence:
        said.insert(1, (root.at, f"{_cut(root.evidence)} ({root.detector})"))
    yield from sorted(said, key=lambda pair: pair[0])


def counts(account: Account) -> str:
    """What the failure takes from the job's allowance."""
    fault = account.diagnosis.fault
    if not fault.charged:
        return "not as a failure, however often it comes"
    row = f"number {account.failures} in a row without a new step" if account.failures else "a new step came before it"
    return f"as a failure {fault.budget}, {row}"


def tried(account: Account) -> Iterator[tuple[float, str]]:
    """(UTC seconds, in words) of what was done, and why; the middle of a long story is left out."""
    lines = [(step.at, _reason(step.reason, step.actions, step.times)) for step in account.tried]
    half = TRIED // 2
    if len(lines) > TRIED:
        left_out = f"({len(lines) - TRIED} decisions more: ray-dr timeline)"
        lines = [*lines[:half], (lines[half][0], left_out), *lines[-half:]]
    yield from lines


def cost(account: Account, story: Story, *, now: float) -> Iterator[str]:
    """Seconds without a step by phase, steps, samples."""
    named = PHASES | ({"decided": "let it wait (recovery.hang)"} if account.first.kind is K.HANG else {})
    parts = ", ".join(f"{named[name]} {duration(took)}" for name, took in account.spans.items() if took >= 0.0005)
    took = duration(without_step_s(account, story, now))
    if account.over_at is not None:
        yield f"{took} from the failure to the next step: {parts}"
    elif account.cut_by:
        yield f"{took} until incident {account.cut_by} came, and no step before it: {parts}"
    elif isinstance(story.standing, Ended):
        yield f"{took} until the job ended, and no step before that: {parts}"
    else:
        yield f"{took} without a step so far: {parts}"
    if account.report.plan is not None and account.report.took_s is not None:
        yield f"expected was: {expected(account.report.plan, account.report.took_s)}"
    yield from _lost(account)


def _lost(account: Account) -> Iterator[str]:
    lost, samples = account.report.steps_lost, account.samples
    if not account.report.attempt:
        return
    if not lost:
        yield "no step lost, no sample lost, none used twice"
        return
    again = f", in {duration(account.again_s)}" if account.again_s is not None else ""
    over = again or (samples is not None and not samples.pending)
    text = f"{count(lost, 'step')} lost and done again{again}" if over else f"{count(lost, 'step')} to be done again"
    if samples is None:
        yield text
    elif samples.lost or samples.repeated:
        yield f"{text}; samples lost: {samples.lost}, used twice: {samples.repeated} (see ray-dr data verify)"
    elif samples.pending:
        yield f"{text}; of {samples.pending} samples the journal does not show yet that they were used"
    elif account.report.incident.kind is FailureKind.DIVERGED:
        yield f"{text}, with the samples that come behind: those that led there are left out (see ray-dr data verify)"
    else:
        yield f"{text}, with the same samples: none lost, none used twice"


def to_do(account: Account, story: Story) -> str:
    """What is left for people to do about an incident."""
    rule = FAULTS[account.diagnosis.kind].remedy
    if _came_again(account, story):
        return "see above: it came again"
    if account.over_at is not None:
        return f"nothing, the job got over it; what goes for its kind: {rule}"
    if account.cut_by:
        return f"see incident {account.cut_by}"
    if isinstance(story.standing, Ended | Waiting):
        return "see above"
    return f"wait, the job is at it; what goes for its kind: {rule}"


def _came_again(account: Account, story: Story) -> bool:
    """Whether the job ended of the same error."""
    last = story.standing.diagnosis if isinstance(story.standing, Ended) else None
    return last is not None and bool(last.root.error) and last.root.error == account.diagnosis.root.error


def without_step_s(account: Account, story: Story, now: float) -> float:
    """Seconds from the failure until the next step, the next failure, the job's end, or now."""
    if account.over_at is not None:
        return account.over_at - account.began_at
    end = story.standing.at if isinstance(story.standing, Ended) else now
    if account.cut_by:
        end = story.accounts[account.cut_by - 1].began_at
    return max(0.0, end - account.began_at)


# --------------------------------------------------------------------------------------------------------------- words


def _title(account: Account) -> str:
    incident = account.report.incident
    term = f" (incident {incident.number} of term {account.report.term})" if incident.number != account.number else ""
    return f"incident {account.number}{term} at {_when(account.began_at)}, after step {incident.step}: {happened(account)}"


def _lines(accounts: Sequence[Account], story: Story, now: float) -> Iterator[str]:
    for account in accounts[:OTHERS]:
        took = f"{duration(without_step_s(account, story, now))} without a step"
        yield f"{_title(account)}; {took}, {count(account.report.steps_lost, 'step')} lost"
    if len(accounts) > OTHERS:
        yield f"and {len(accounts) - OTHERS} more: --incident N"


def _set_aside(diagnosis: Diagnosis) -> Iterator[str]:
    """Echoes, those for one reason together."""
    groups: dict[str, list[str]] = {}
    for aside in diagnosis.aside:
        groups.setdefault(aside.reason.partition(" (")[0], []).append(aside.finding.evidence)
    for reason, evidence in groups.items():
        more = f" and {len(evidence) - 1} like it" if len(evidence) > 1 else ""
        yield f"{_cut(evidence[0])}{more}: only an echo, {reason}"


def _reason(reason: str, actions: Iterable[Action], times: int) -> str:
    done = ", ".join(filter(None, map(_did, actions)))
    text = FOUND.sub("", reason.replace(LOOKING, ""))
    text = _cut(f"{text} ({times} times)" if times > 1 else text)
    return short(f"{text} -> {done}" if done else text)


def _did(action: Action) -> str:
    """An action in words; empty where the decision's reason says as much."""
    match action:
        case StartWorkers():
            return f"start {count(action.count, 'worker')} on node {action.node}"
        case RequestNodes():
            return f"ask the cluster for {count(action.count, 'node')} in all"
        case ReleaseNode():
            return f"give node {action.node} back"
        case AbortGroup():
            return f"free {count(len(action.members), 'worker')} from the broken step"
        case KillWorker():
            return f"end worker {action.worker}"
        case TakeInventory():
            return "look for the newest version"
        case StopGroup():
            return "stop at a common step"
        case FormGroup() | SaveFinal():
            return ""
        case CloseJob():
            return "end all that is left of the job"
        case Rescue():
            return f"have survivors stage step {action.step}"
        case _ as never:
            assert_never(never)


def _who(subjects: Sequence[Subject]) -> str:
    names = [f"{subject} (worker {subject.worker})" if subject.rank is not None else str(subject) for subject in subjects]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more if names else "somebody"


def _after(account: Account, lines: Sequence[tuple[str, float, str]]) -> list[tuple[str, str]]:
    """Rows whose texts begin with the seconds since the failure began."""
    return [(label, f"{_plus(max(0.0, at - account.began_at)):<9} {text}") for label, at, text in lines]


def _plus(after_s: float) -> str:
    return f"+{after_s:.1f} s" if 59.95 <= after_s < 1000 else f"+{duration(after_s)}"


def _rows(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """`label  text` lines; a label that is repeated is shown once, a long text goes on below itself."""
    before = ""
    for label, text in rows:
        hang = " " * (LABEL + 2 + (10 if text.startswith("+") else 0))
        yield from _wrapped(f"  {'' if label == before else label:<{LABEL}}{text}", hang)
        before = label


def _wrapped(text: str, hang: str) -> list[str]:
    bound = _BEFORE_UNIT.sub("\xa0", text)
    lines = textwrap.wrap(bound, WIDTH, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _cut(text: str) -> str:
    """One line of at most EVIDENCE characters, of a longer text its beginning and its end."""
    flat = " ".join(text.split())
    tail = EVIDENCE // 3
    return flat if len(flat) <= EVIDENCE else f"{flat[: EVIDENCE - tail - 5].rstrip()} ... {flat[-tail:].lstrip()}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


# ---------------------------------------------------------------------------------------------------------------- JSON


def as_dict(name: str, story: Story, shown: Iterable[Account], *, now: float) -> dict[str, Any]:
    """The same for programs, incidents newest first; times in UTC seconds, durations in seconds."""
    stands = story.standing
    since = stands.at if isinstance(stands, Ended) else stands.since
    told: dict[str, Any] = {"since": since, "text": standing(name, story, now=now)}
    match stands:
        case Waiting():
            told |= {"phase": stands.phase, **to_json(stands), "to_do": advice(stands)}
        case Going():
            told |= {"phase": stands.phase}
        case Ended():
            told |= {"phase": type(stands.phase).__name__.lower(), "reason": stands.reason,
                     "exit_code": exit_code(name, stands), "resubmit": getattr(stands.phase, "resubmit", True),
                     "kind": stands.diagnosis.kind if stands.diagnosis else None}  # fmt: skip
            if isinstance(stands.phase, Failed):
                told["to_do"] = remedy_at_end(stands)
    return {"job": name, "step": story.step, "standing": told, "incidents": [_incident(account, story, now) for account in shown]}


def _incident(account: Account, story: Story, now: float) -> dict[str, Any]:
    diagnosis, incident, report = account.diagnosis, account.report.incident, account.report
    fault = FAULTS[diagnosis.kind]
    return {
        "number": account.number, "term": report.term, "at": account.began_at, "step": incident.step, "kind": diagnosis.kind,
        "happened": happened(account), "subjects": to_json(diagnosis.subjects), "over": account.over_at is not None,
        "set_aside": [{"kind": a.finding.kind, "evidence": a.finding.evidence, "reason": a.reason} for a in diagnosis.aside],
        "besides": [finding.evidence for finding in diagnosis.besides],
        "known_by": [{"after_s": at - account.began_at, "text": text} for at, text in known_by(account)],
        "tried": [
            {"after_s": step.at - account.began_at, "actions": to_json(step.actions, tagged=True), "reason": step.reason,
             "times": step.times}
            for step in account.tried
        ],
        "without_step_s": without_step_s(account, story, now),
        "phases_s": account.spans, "again_s": account.again_s, "steps_lost": report.steps_lost,
        "samples": to_json(account.samples), "charged": fault.charged, "to_do": to_do(account, story),
        "budget": fault.budget, "failures": account.failures, "plan": to_json(report.plan), "took_s": report.took_s,
    }  # fmt: skip
