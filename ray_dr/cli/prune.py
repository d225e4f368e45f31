"""`ray-dr prune JOB`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import click

from ray_dr import config
from ray_dr.cli.check import known_damage
from ray_dr.cli.stored import StoredJob, find_job, job_argument, read_spec
from ray_dr.cli.words import duration, print_json, table
from ray_dr.errors import ConfigError, StoreError
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.codec import to_json
from ray_dr.model.job import Keep
from ray_dr.repository import prune
from ray_dr.repository.check import merge, take_inventory
from ray_dr.repository.commit import CommitLog, LogView, Pending
from ray_dr.repository.retention import PrunePlan, plan_prune


def _span(_: click.Context, __: click.Parameter, value: str) -> float:
    """`1h` -> 3600.0."""
    return config.parse_span(value, "--grace")


@click.command("prune")
@job_argument
@click.option("--keep", "rules", metavar="RULES", help="What stays: last=5,hourly=24,daily=7,weekly=4,within=2d.")
@click.option(
    "--grace", callback=_span, default="1h", show_default=True, help="How long readers may still need what goes."
)
@click.option("--yes", is_flag=True, help="Do it. Without it, say what would be done.")
def command(job: str, store: str | None, as_json: bool, rules: str | None, grace: float, yes: bool) -> None:
    """Let old checkpoints go: which, and why. Nothing is changed without --yes.

    What stays is said by --keep, else by `keep` in job.yaml: whatever any rule wants, and always the newest good one. Only
    good checkpoints count: those whose objects are all there with their sizes, and of which no `ray-dr check` from here
    knows anything worse. Saves and restores may go on meanwhile. What is dropped can't be restored any more at once; its
    objects go with the first prune after the grace, by this command or by the job itself.
    """
    found = find_job(job, store)
    keep = _rules(job, rules)
    judge = _judge(found)
    log = CommitLog(found.store, found.name)
    seen = log.refresh()
    if seen.unread:
        entries = ", ".join(map(str, seen.unread))
        raise StoreError(f"the commit log is damaged (entry {entries}), so nothing is pruned; `ray-dr check` says more")
    done: prune.Pruned | None = None
    if yes:
        done = prune.execute(found.store, log, found.name, keep=keep, term=None, judge=judge, grace_s=grace, whole=True)
        plan, pending = done.plan, done.pending
        log.mark()
    else:
        plan, pending = plan_prune(seen.checkpoints, keep, judge(seen.checkpoints)), seen.pending
    if as_json:
        print_json(_as_json(found, plan, pending, done))
        return
    _tell(plan, pending, done, time.time())
    for hold in log.refresh().holds:
        click.echo(f"the objects of step {hold.manifest.version.step} stay: job {hold.holder} shares them")


def _rules(job: str, rules: str | None) -> Keep:
    if rules is not None:
        return config.parse_keep(rules)
    spec = read_spec(job)
    if spec is None:
        remedy = "write --keep last=5,daily=7 or the path of its job.yaml instead of its name"
        raise ConfigError("nothing says which checkpoints are to stay", remedy=remedy, key="--keep")
    return spec.store.keep


def _judge(found: StoredJob) -> prune.Judge:
    """Says what is wrong with checkpoints, as the store's listing and the last checks have it. Asks once about each."""
    noted = known_damage(found)
    known: dict[VersionId, str] = {}

    def judge(manifests: Sequence[Manifest]) -> Mapping[VersionId, str]:
        new = tuple(each for each in manifests if each.version not in known)
        if new:
            known.update(dict.fromkeys((each.version for each in new), ""))
            listed = take_inventory(found.store, found.name, LogView(checkpoints=new)).damaged
            for damage in merge((*listed, *noted)):
                for version in damage.versions:
                    if version in known:
                        known[version] = f"damaged: {damage.key} {damage.what}"
        return {version: what for version, what in known.items() if what}

    return judge


def _tell(plan: PrunePlan, pending: Sequence[Pending], done: prune.Pruned | None, now: float) -> None:
    if not plan.keep and not plan.drop:
        click.echo("no checkpoint is committed")
        return
    verdicts = [(each, "keep") for each in plan.keep] + [(each, "goes") for each in plan.drop]
    verdicts.sort(key=lambda pair: pair[0].manifest.version)
    rows = [
        (
            verdict.manifest.version.step, verdict.manifest.version.attempt,
            duration(max(0.0, now - verdict.manifest.created_at)), what, verdict.reason,
        )
        for verdict, what in verdicts
    ]  # fmt: skip
    click.echo(table(("step", "attempt", "age", "", "because"), rows, right=range(3)))
    for each in pending:
        left = duration(max(0.0, each.until - now))
        click.echo(f"step {each.manifest.version.step} is dropped; its objects stay for readers, {left} more")
    if done is None:
        click.echo(f"{len(plan.drop)} would go; nothing was changed (--yes does it)")
    else:
        click.echo(
            f"{len(plan.drop)} dropped; {done.parts_removed} part lists and {done.chunks_removed} chunks removed"
        )


def _as_json(
    found: StoredJob, plan: PrunePlan, pending: Sequence[Pending], done: prune.Pruned | None
) -> dict[str, object]:
    return {
        "job": found.name,
        "keep": [{**_named(each.manifest), "reason": each.reason} for each in plan.keep],
        "drop": [{**_named(each.manifest), "reason": each.reason} for each in plan.drop],
        "pending": [{**_named(each.manifest), "until": each.until} for each in pending],
        "executed": done is not None,
        "parts_removed": done.parts_removed if done else 0,
        "chunks_removed": done.chunks_removed if done else 0,
    }


def _named(manifest: Manifest) -> dict[str, object]:
    return {**to_json(manifest.version), "created_at": manifest.created_at}
