"""The command that says whether zeros are where they should be, in any Hugging Face model folder.

    python -m lit_recon.verify FOLDER [--masks FILE] [--pattern N:M] [--sparsity SHARE] [--dense FOLDER]

No model is loaded: its files are looked at, one tensor at a time. Exit status: 0 if all that was asked holds, 1 if not,
2 for what cannot be looked at.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lit_recon.system.terminal import Parser, readable_output, say
from lit_recon.verify.request import TOLERANCE, Request, make_request


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the folder on the command line and print what was found.

    Args:
        arguments: The command line without the program's name; None takes that of the process.

    Returns:
        The exit status: 0 if all that was asked holds, 1 if something does not.

    Raises:
        SystemExit: With status 2 and a message on stderr where something cannot be looked at; 0 after `--help`.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    readable_output()
    request = _request(chosen, parser)

    # Here and not at the top: torch and transformers take seconds, which --help and messages do not need.
    import transformers

    from lit_recon.system.command_line import in_words
    from lit_recon.verify.findings import examine
    from lit_recon.verify.output import as_json, print_findings

    transformers.logging.set_verbosity_error()  # it remarks on settings of config.json
    try:
        findings = examine(request)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{in_words(error)}\n")
    if chosen.json:
        say(as_json(findings))
    else:
        print_findings(findings, every=chosen.all)
    return int(not all(verdict.holds for verdict in findings.verdicts()))


def _parser() -> ArgumentParser:
    about = (
        "Say which weights of a Hugging Face model folder are zero, whoever made it, and whether that is as it should "
        "be. Exit status: 0 if all that is asked holds, 1 if not, 2 for what cannot be looked at."
    )
    parser = Parser(prog="python -m lit_recon.verify", description=about)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with safetensors, or of a run")
    parser.add_argument(
        "--masks", metavar="FILE", type=Path, help="masked weights are zero: the masks.safetensors of a run"
    )
    parser.add_argument("--pattern", metavar="N:M", help="at most N of every M weights along the inputs are not zero")
    parser.add_argument("--sparsity", metavar="SHARE", type=float, help="at least this share of the matrices is zero")
    tolerance = f"how far below --sparsity it may be (default {TOLERANCE})"
    parser.add_argument("--tolerance", metavar="SHARE", type=float, help=tolerance)
    dense = "folder of the dense model: tell which tensors differ from its own (which is no matter of the exit status)"
    parser.add_argument("--dense", metavar="FOLDER", type=Path, help=dense)
    parser.add_argument("--all", action="store_true", help="list every matrix and tensor by itself")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _request(chosen: Namespace, parser: ArgumentParser) -> Request:
    """What the command line asks; exit with the problems if it cannot be asked."""
    try:
        return make_request(
            chosen.folder,
            masks=chosen.masks,
            dense=chosen.dense,
            pattern=chosen.pattern,
            sparsity=chosen.sparsity,
            tolerance=chosen.tolerance,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.exit(main())
