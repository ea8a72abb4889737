# SPDX-License-Identifier: Apache-2.0
"""What may be given to the command ``lab``: its subcommands and their options. ``launch.cli`` does what they say."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import distributed
from research.core.errors import UserError
from research.train import watchdog
from research.train.places import place

TEXT_FILES = "**/*.txt"


def folder(text: str) -> Path | str:
    """A folder; what is none is refused, in a sentence, when the command is begun."""
    with contextlib.suppress(UserError):
        return place(text)
    return text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lab", description="Train language models, sweep them, fit scaling laws.")
    top.add_argument(
        "--runs", type=folder, default="runs", metavar="DIR", help="folder of all runs, gs://... too (default: runs)"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=name)
        return sub

    sub = add("run", "run one experiment of a study")
    add_study(sub)
    sub.add_argument("--only", required=True, metavar="NAME", help="the experiment's name")
    sub.add_argument("--profile", action="store_true", help="trace a few steps into the run's profile folder")
    add_running(sub)
    sub = add("sweep", "run every unfinished experiment of a study, then analyse it")
    add_study(sub)
    add_running(sub)
    add_submitting(sub)
    add_tpus(sub)
    add_following(add)
    add_plan(add)
    add_study(add("analyze", "analyse the finished runs of a study"))
    add_study(add("list", "list a study's experiments and how far they are"))
    add_laws(add)
    add_models(add, commands)
    tokenizer = commands.add_parser("tokenizer", help="train tokenizers").add_subparsers(required=True)
    sub = tokenizer.add_parser("train", help="train a SentencePiece tokenizer on a corpus, or find it trained")
    sub.set_defaults(command="tokenizer")
    sub.add_argument("corpus", help="stdlib, a folder of text files, or a .jsonl file with a text field")
    sub.add_argument("--kind", choices=("bpe", "unigram"), default="bpe")
    sub.add_argument("--vocab-size", type=int, default=8192)
    sub.add_argument("--pattern", default=TEXT_FILES, help=f"which files of a folder (default: {TEXT_FILES})")
    sub.add_argument("--text-field", default="text", help="the field of a .jsonl file that holds the text")
    return top


def add_models(add: Callable[..., argparse.ArgumentParser], commands: Any) -> None:
    """The commands about one model: text from it, and Hugging Face files."""

    def add_loading(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--mesh", metavar="AXIS=N,...", help="how to spread the model, such as fsdp=8,tensor=2")
        sub.add_argument(
            "--dtype", choices=("float32", "bfloat16"), help="of weights and products (default: as stored)"
        )

    sub = add("sample", "write text with a trained model")
    sub.add_argument("model", help="a run's or an import's folder, gs://... too, or one with Hugging Face files")
    given = sub.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="the text to go on from")
    given.add_argument("--prompts", type=Path, metavar="FILE", help='lines of JSON, {"prompt": "..."} each')
    sub.add_argument("--out", type=Path, metavar="FILE", help="where the texts of --prompts go; begun, it is completed")
    sub.add_argument("--tokens", type=int, default=128, help="tokens to add at most (default: %(default)s)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the likeliest that reach P together")
    sub.add_argument("--min-p", type=float, default=0.0, metavar="P", help="among those P times as likely as the first")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="of tokens already seen")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text before it (repeatable)")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt")
    sub.add_argument("--best-of", type=int, metavar="N", help="of N texts the one of the highest mean log-probability")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--slots", type=int, default=8, metavar="N", help="sequences at a time (default: %(default)s)")
    sub.add_argument("--cache", choices=("compute", "float32", "bfloat16", "int8"), default="compute",
                     help="what keys and values are stored as (default: as they are computed)")  # fmt: skip
    add_loading(sub)
    sub = add("eval", "run tasks of EleutherAI's harness on a model (needs the extra eval)")
    sub.add_argument("model", help="as for lab sample")
    sub.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="files (.yaml), or names it knows")
    sub.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    sub.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task alone")
    sub.add_argument("--slots", type=int, default=8, metavar="N", help="sequences at a time (default: %(default)s)")
    sub.add_argument("--length", type=int, metavar="TOKENS", help="what the model sees at once (default: as trained)")
    sub.add_argument("--out", type=Path, metavar="FILE", help="all results and samples, as JSON")
    add_loading(sub)
    kinds = commands.add_parser("import", help="take over a model's weights").add_subparsers(required=True)
    sub = kinds.add_parser("hf", help="from a folder of Hugging Face files, as a checkpoint that runs start from")
    sub.set_defaults(command="import")
    sub.add_argument("path", type=Path, help="a folder with config.json, safetensors and a tokenizer")
    sub.add_argument("--out", metavar="DIR", help="the new folder (default: RUNS/hf/NAME)")
    add_loading(sub)
    kinds = commands.add_parser("export", help="write a model for others").add_subparsers(required=True)
    sub = kinds.add_parser("hf", help="as a folder of Hugging Face files")
    sub.set_defaults(command="export")
    sub.add_argument("run", help="a run's or an import's folder, or one of its checkpoints")
    sub.add_argument("path", type=Path, help="the new folder")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    sub.add_argument("--length", type=int, help="the most positions promised (default: those of training)")


def add_study(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("study", help="a study file, or FILE:FUNCTION for another sweep in it")
    sub.add_argument(
        "--set", dest="overrides", metavar="PATH=VALUE", action="append", default=[],
        help="change a field of every run, e.g. model.d_model=512, or NAME.model.d_model=512 of one (repeatable)",
    )  # fmt: skip


def add_running(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--stall-minutes", type=float, default=watchdog.MINUTES, metavar="MINUTES",
        help="end a run that makes no progress for so long (default: %(default)g; 0: never)",
    )  # fmt: skip
    group = sub.add_argument_group("several hosts", "the same command on each; found by itself on TPU pods and Slurm")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of host 0, with a free port")
    group.add_argument("--hosts", type=int, metavar="N", help="how many hosts there are (1: this one alone)")
    group.add_argument("--host", type=int, metavar="I", help="which of them this one is, from 0")
    group.add_argument(
        "--host-timeout", type=float, default=distributed.TIMEOUT, metavar="SECONDS",
        help="how long to wait for the others (default: %(default)g)",
    )  # fmt: skip


def add_following(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands about sweeps that an executor has in hand."""
    sub = add("status", "what is known of the runs of a sweep, or of all sweeps below --runs")
    sub.add_argument("study", nargs="?", help="a study file, or the name of its folder of runs (default: all)")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    sub = add("logs", "print what a run of a sweep has printed")
    sub.add_argument("study", help="a study file, or the name of its folder of runs")
    sub.add_argument("run", metavar="RUN", help="the run's name")
    sub.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until the run is over")
    sub.add_argument("--host", type=int, default=0, metavar="I", help="of several hosts, which (default: 0)")
    sub = add("cancel", "end runs of a sweep and give back what they hold")
    sub.add_argument("study", help="a study file, or the name of its folder of runs")
    sub.add_argument("run", nargs="*", metavar="RUN", help="which (default: all)")
    sub = add("gc", "list and delete TPU requests that no live run owns")
    sub.add_argument("--delete", action="store_true", help="delete them")
    sub.add_argument("--unknown", action="store_true", help="those of journals elsewhere too")
    sub.add_argument("--zones", metavar="ZONE,...", help="besides those that the journals name")
    sub.add_argument("--project", help="default: that of gcloud")


def add_plan(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add("plan", "compile a study's programs for TPUs that are not here: memory, time and cost of each run")
    add_study(sub)
    sub.add_argument("--tpu", required=True, metavar="SLICE", help="a slice, such as v5e-256, v6e-64, v5p-128, v4-32")
    sub.add_argument("--slices", type=int, default=1, metavar="N", help="how many such slices for each run")
    sub.add_argument("--generate", metavar="SLOTSxTOKENS", help="prefill and decode too, such as 32x2048")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--mesh", metavar="AXIS=N,...", help="instead of the experiments' own, such as fsdp=256")
    how.add_argument("--search", action="store_true", help="find the fastest mesh, recomputation and microbatches")
    sub.add_argument("--pricing", default="on-demand", help="a column of the price table (default: %(default)s)")
    sub.add_argument("--prices", type=Path, metavar="FILE", help="a price table instead of launch/prices.toml")
    sub.add_argument("--estimate", action="store_true", help="by arithmetic alone, compiling nothing")
    sub.add_argument("--fresh", action="store_true", help="make the plan anew; compiled programs are still used")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")


def add_submitting(sub: argparse.ArgumentParser) -> None:
    """Options of ``lab sweep --on``."""
    group = sub.add_argument_group("executors", "hand the runs to an executor instead of running them in this process")
    group.add_argument("--on", choices=("local", "tpu-vm", "sky"), help="worker processes here, TPU VMs, or SkyPilot")
    group.add_argument("--parallel", type=int, metavar="N", help="how many workers, slices or jobs at a time")
    group.add_argument("--retries", type=int, default=1, help="of a run that crashes (default: %(default)s)")
    group.add_argument("--backoff", type=float, metavar="SECONDS", help="before a run's second attempt, then doubled")
    group.add_argument("--budget", type=float, metavar="CHIP-HOURS", help="after which nothing more is submitted")
    group.add_argument("--dry-run", action="store_true", help="print every command and file that would be sent")
    group.add_argument("--poll", type=float, metavar="SECONDS", help="between looks at what was submitted")


def add_tpus(sub: argparse.ArgumentParser) -> None:
    """Options of what a sweep asks a cloud for."""
    group = sub.add_argument_group("TPU VMs")
    group.add_argument("--tpu", metavar="SLICE", help="for each run: v5e-16, v6e-64, v5p-128, v4-32")
    group.add_argument("--slices", type=int, default=1, metavar="N", help="how many such slices for each run")
    group.add_argument("--zones", metavar="ZONE,...", help="in the order to try them")
    group.add_argument("--shared-runs", action="store_true", help="--runs is a file system that the machines mount too")
    group.add_argument(
        "--provisioning", choices=("spot", "on-demand", "reserved"), default="spot", help="default: %(default)s"
    )
    group.add_argument("--project", help="default: that of gcloud")
    group.add_argument("--service-account", metavar="EMAIL", help="of the machines; or $LAB_SERVICE_ACCOUNT")
    group.add_argument("--runtime-version", help="default: the one for the chip")
    group.add_argument("--valid-for", metavar="DURATION", help="how long a request may wait for capacity, such as 6h")
    group.add_argument("--network", help="default: the project's default network")
    group.add_argument("--subnetwork")
    group.add_argument("--internal-ips", action="store_true", help="no address outside the network (needs Cloud NAT)")
    group.add_argument("--python", metavar="PATH", help="on an image that has everything; else it is installed")
    group.add_argument(
        "--gcloud-timeout", type=float, default=120.0, metavar="SECONDS", help="of one command (default: %(default)g)"
    )
    group.add_argument(
        "--start-minutes", type=float, default=30.0, help="until a host must have come up (default: %(default)g)"
    )


def add_laws(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that read a law from runs: this project's, or anybody's in a CSV file."""

    def add_runs(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("runs_of", metavar="STUDY|CSV", help="a study file, or a CSV file with a row for each run")
        group = sub.add_argument_group("columns of a CSV file", "the usual names are found by themselves")
        for name in ("params", "tokens", "flops", "loss", "name", "status"):
            group.add_argument(f"--{name}-column", metavar="COLUMN")
        sub.add_argument(
            "--drop-highest-loss", type=int, default=0, metavar="K", help="leave out the K runs of the highest loss"
        )
        sub.add_argument(
            "--parameters", choices=("total", "non_embedding", "with_head"), default="total",
            help="which parameters count (default: %(default)s)",
        )  # fmt: skip
        sub.add_argument(
            "--count-flops", choices=("exact", "six_per_param"), default="exact",
            help="FLOPs as the runs have them, or 6 per counted parameter and token",
        )  # fmt: skip
        sub.add_argument("--max-warmup", type=float, metavar="SHARE", help="leave out runs with a longer warm-up")
        sub.add_argument("--drop-budgets", type=int, default=0, metavar="K", help="leave out the K largest budgets")
        sub.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss of log loss; inf: least squares")
        sub.add_argument("--resamples", type=int, default=4000, help="bootstrap fits behind the intervals")
        sub.add_argument("--seed-noise", type=float, default=0.0, metavar="SD", help="of log loss, between seeds")

    sub = add("fit", "fit a scaling law to runs and report it, with intervals")
    add_runs(sub)
    sub.add_argument("--law", choices=("chinchilla", "kaplan", "over-training"), default="chinchilla")
    sub.add_argument("--flops", type=float, help="the budget to recommend for (default: 10 times the largest)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report, pictures and law.json go")
    sub = add("recommend", "recommend a model and its tokens for a budget, with intervals")
    add_runs(sub)
    sub.add_argument("--flops", type=float, required=True, help="the budget, in training FLOPs")
    sub.add_argument("--served", metavar="TOKENS", help="tokens that the model will serve in its life")
    sub.add_argument("--unique-tokens", metavar="TOKENS", help="tokens that there are to train on")
    sub.add_argument("--family", help="shape of the models to build: llama, gpt, small (default: the study's own)")
    sub.add_argument("--out", type=Path, metavar="FILE", help="where the experiment file goes (default: under --runs)")
    sub = add("next", "propose the runs that most shrink the interval of the optimal size")
    add_runs(sub)
    sub.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="what the runs may cost together")
    sub.add_argument("--flops", type=float, help="the target budget (default: 10 times the largest run)")
    sub.add_argument("--family", help="shape of the models to build: llama, gpt, small (default: the study's own)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where next.py and next.json go (default: --runs)")
