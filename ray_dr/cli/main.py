"""`ray-dr`: the command line. Each verb's module is imported when it is used, so that `--help` is instant.

Exit status: 0 well; 1 something failed, or what was to be checked is not true; 2 bad input (a wrong argument, a
job.yaml with an error, an unknown job); 3 the job failed and running it again would fail the same way; 130 stopped by
Ctrl-C (`run` has drained: the job is saved and goes on when run again). What goes wrong is one line on stderr.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import click

from ray_dr.errors import ConfigError, JobFailed, RayDrError

FAILED, BAD_INPUT, DO_NOT_RESUBMIT, INTERRUPTED = 1, 2, 3, 130

VERBS = {
    "run": "Run a training function until it is done, through failures and resizes.",
    "resume": "Go on with a job whose cluster is gone, from its store alone.",
    "guard": "Watch jobs' stores, and submit those again whose cluster is lost.",
    "status": "Where a job stands.",
    "why": "What happened, how it was known, what was tried, what it cost, what to do.",
    "timeline": "What went wrong, how long each part of getting over it took, and every decision's reason.",
    "checkpoints": "The checkpoints that can be restored.",
    "restore": "Write a checkpoint as one safetensors file or for torch's DCP, verified.",
    "import": "Bring a safetensors, torch.save or DCP checkpoint into a store, without running its pickles.",
    "check": "Prove that the checkpoints in the store are whole.",
    "prune": "Let old checkpoints go: what, and why; with --yes.",
    "replay": "Decide a job's past anew with this version's code and show what differs.",
    "simulate": "Live jobs' lives in virtual time, with faults by chance, and check that what must hold does.",
    "data": "What a job's journal proves about its data.",
    "keys": "Change the key that opens an encrypted store, without touching its data.",
    "store": "Whether a store keeps what the commits and the data rest on, and how fast it is.",
    "nodes": "Machines that jobs of a store had trouble with: scores, who is left out, and why.",
    "demo": "Lose a node in the middle of a step, on this machine, and compare with a run that did not.",
}


class Verbs(click.Group):
    """The verbs above. The text of the overview is here, everything else in `ray_dr.cli.<verb>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"ray_dr.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayDrError as error:
            click.echo(f"ray-dr: {error}", err=True)
            ctx.exit(exit_status(error))
        except KeyboardInterrupt:
            click.echo("ray-dr: interrupted", err=True)
            ctx.exit(INTERRUPTED)


def exit_status(error: RayDrError) -> int:
    """What an error that reached the top makes of the exit status."""
    match error:
        case ConfigError():
            return BAD_INPUT
        case JobFailed(resubmit=False):
            return DO_NOT_RESUBMIT
        case _:
            return FAILED


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"ray-dr {importlib.metadata.version('ray-dr')}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Say which.")
def main() -> None:
    """Training jobs on Ray that stay alive, and grow and shrink.

    JOB is the path of a job.yaml, or a job's name together with --store. All but `run`, `resume`, `guard` and
    `demo` work from the store alone, also when the cluster is gone.
    """


if __name__ == "__main__":
    main()
