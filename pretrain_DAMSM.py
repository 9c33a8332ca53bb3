"""Train DAMSM's text and image encoders, as a YAML file says. Arguments and objects only; no maths here.

    python pretrain_DAMSM.py --cfg cfg/DAMSM/bird.yml --gpu 0
    python pretrain_DAMSM.py --cfg cfg/DAMSM/bird.yml --resume

The encoders go to DAMSMencoders/<DATASET_NAME>/best.pth, where main.py looks for them.
"""

import argparse
import logging
import sys
from pathlib import Path

from miscc.command_line import parser_with_settings, settings_from
from miscc.errors import run_command

logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
logger = logging.getLogger("pretrain_DAMSM")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_with_settings(__doc__.splitlines()[0], "cfg/DAMSM/bird.yml")
    parser.add_argument("--overwrite", action="store_true", help="start anew, replacing encoders that are there")
    parser.add_argument("--out", metavar="DIR", help="folder of the encoders (default: DAMSMencoders/<DATASET_NAME>)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from miscc.distributed import refuse_several_processes, start  # torch comes with it: --help should not wait for it
    from training.damsm import pretrain
    from training.run_dir import EncoderDir
    from training.settings import keys_without_effect, load_config

    refuse_several_processes("pretraining the encoders")

    # The settings, and which of them have no effect here.
    changes = settings_from(options)
    cfg = load_config(options.cfg, changes, command="damsm")
    for key in keys_without_effect(options.cfg, changes, command="damsm"):
        logger.warning("%s: %s has no effect for the encoders", options.cfg, key)
    device = start(cfg.GPU_ID, cfg.CUDA).device

    # Where the encoders go, and whether a training there goes on.
    folder = Path(options.out or Path("DAMSMencoders") / cfg.DATASET_NAME)
    resume = cfg.RESTORE or (options.resume_if_exists and EncoderDir(folder).has_state())
    return pretrain(cfg, device, folder, resume=resume, overwrite=options.overwrite)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
