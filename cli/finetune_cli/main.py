"""The `finetune` command, also `kubectl finetune`.

Exit codes: 0 success; 1 the job failed; 2 wrong usage or a job that is refused; 3 no answer from the cluster, or no
such job; 124 time-out of `wait`; 130 stopped by Ctrl-C. A `run` that fails ends with the trainer's own code: 10-29 are
final (change the job, the data or the rights); 30-49, and 1, which nobody foresaw, may pass at another try.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from finetune_api.job import MethodType
from finetune_cli.errors import CommandError, Exit
from finetune_cli.screen import terminal

MAX_SHOWN_ROWS = 1000  # of each dataset, by `data show`
MAX_PAGE_ROWS = 20  # of each dataset, on the page of `data check`

app = typer.Typer(
    help=(__doc__ or "").replace("\n", " ").replace("  ", "\n\n"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("run")
def run_command(
    job: Annotated[Path, typer.Argument(help="File with a FineTuneJob.", show_default=False)],
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Where data, checkpoints and logs are kept. Default: .finetune/NAME-ID beside the file."),
    ] = None,
) -> None:
    """Run a job on this machine, without a cluster. The same command goes on with a job that was stopped.

    URIs may also be file:///…. Storage credentials come from the usual AWS places (environment, profile, role);
    AWS_ENDPOINT_URL_S3 wins over the endpoint in the file.

    Ctrl-C or SIGTERM stops once what is done is saved, a second one at once. Started in the background, where the shell
    ignores Ctrl-C for it (`&` in a script, nohup, many CI systems), it keeps ignoring it; SIGTERM is always heard.
    """
    from finetune_cli.run import run

    raise typer.Exit(run(job, work_dir, terminal()))


Name = Annotated[str, typer.Argument(help="Name of the FineTuneJob.", show_default=False)]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Default: that of the kubeconfig.", show_default=False)
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.", show_default=False)]


@app.command("wait")
def wait_command(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds. Default: no limit.", show_default=False)] = None,
) -> None:
    """Wait until a job in the cluster has ended: 0 on success, 1 on failure, 124 on time-out."""
    from finetune_cli.cluster import Cluster
    from finetune_cli.wait import wait

    cluster = Cluster(context)
    raise typer.Exit(wait(cluster, namespace or cluster.namespace, name, timeout, terminal()))


@app.command("describe")
def describe_command(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Show a job in the cluster: where it is, why, what was chosen, what was tried, what came out."""
    from finetune_cli.cluster import Cluster, UnavailableError
    from finetune_cli.describe import describe

    cluster = Cluster(context)
    try:
        job = cluster.get(namespace or cluster.namespace, name)
    except UnavailableError as error:
        raise CommandError(str(error), Exit.CLUSTER) from error
    describe(job, terminal())


@app.command("validate")
def validate_command(
    jobs: Annotated[list[Path], typer.Argument(help="Files with one FineTuneJob or more.", show_default=False)],
) -> None:
    """Judge jobs as the cluster would, without one: for editors, hooks and pipelines."""
    from finetune_cli.licenses import unknown_licenses
    from finetune_cli.load import load_jobs
    from finetune_cli.validate import problems

    console = terminal(stderr=True)
    judged = ((path, problems(job, local=False) or unknown_licenses(job)) for path in jobs for job in load_jobs(path))
    wrong = [f"{path}: {line}" for path, lines in judged for line in lines]
    for line in wrong:
        console.print(line, markup=False, soft_wrap=True)
    raise typer.Exit(Exit.USAGE if wrong else Exit.SUCCEEDED)


data_app = typer.Typer(help="See what a job learns from its rows, without a cluster.", no_args_is_help=True)
app.add_typer(data_app, name="data")
Target = Annotated[
    str, typer.Argument(help="A job's file (.yaml, .yml), or the URI or path of data.", show_default=False)
]
Model = Annotated[str | None, typer.Option(help="For a URI of data: that of the base model.", show_default=False)]
Method = Annotated[MethodType, typer.Option(help="For a URI of data.")]


@data_app.command("show")
def data_show_command(
    target: Target,
    rows: Annotated[int, typer.Option("-n", min=1, max=MAX_SHOWN_ROWS, help="Rows of each dataset.")] = 3,
    row: Annotated[str | None, typer.Option(help="One row, as FILE:N.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; docs/data.md says what is what.")] = False,
    model: Model = None,
    method: Method = MethodType.SFT,
) -> None:
    """Show rows as they are rendered, what of them is learned, and which are dropped and why.

    Credentials are those of `finetune run`. Other choices (columns, format, ...) stand in a job's file.
    """
    from finetune_cli.data import show

    raise typer.Exit(show(target, rows, row, as_json, model, method, terminal()))


@data_app.command("check")
def data_check_command(
    target: Target,
    model: Model = None,
    method: Method = MethodType.SFT,
    report: Annotated[Path | None, typer.Option(help="Write what is found as a page, too.", show_default=False)] = None,
    with_rows: Annotated[
        int, typer.Option(min=0, max=MAX_PAGE_ROWS, help="Rows of each dataset on that page, as they are learned.")
    ] = 0,
) -> None:
    """Do all of prepare but writing: what would be dropped and why, shapes, lengths, choices.

    Ends with 0, or as prepare would: 11 for data, 10 for the job, 12 for what is not there, 13 for what is denied.
    The page (HTML) holds no data unless rows are asked for: then keep it as you keep the data.
    """
    from finetune_cli.data import Page, check

    if with_rows and report is None:
        raise CommandError("--with-rows is about the page of --report", Exit.USAGE)
    raise typer.Exit(check(target, model, method, terminal(), None if report is None else Page(report, with_rows)))


def main() -> None:
    """Entry point: known errors as one line, never a trace."""
    try:
        app()
    except CommandError as error:
        terminal(stderr=True).print(f"[bold red]Error[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:  # `finetune … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except MemoryError:  # of this process, or of one that it had started and the kernel took
        words = "this machine has too little free memory for it: a process of the command was ended"
        terminal(stderr=True).print(f"[bold red]Error[/] {words}", soft_wrap=True)
        sys.exit(Exit.FAILED)
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        words = f"{where}{error.strerror or type(error).__name__}"
        terminal(stderr=True).print(f"[bold red]Error[/] {escape(words)}", soft_wrap=True)
        sys.exit(Exit.FAILED)


if __name__ == "__main__":
    main()
