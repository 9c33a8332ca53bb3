"""Settings of drawing. How much is drawn, and where it goes, are options of the command line."""

from dataclasses import dataclass

from miscc.settings import setting


@dataclass(frozen=True)
class SamplingSettings:
    """Whether to draw instead of training, and from which noise."""

    validates: bool = setting("B_VALIDATION", False, "True: sample the test captions instead of training")
    trains: bool = setting("TRAIN.FLAG", True, "False: sample instead of training")
    truncation: float | None = setting(
        "GAN.TRUNCATION",
        None,
        "sample with noise cut at +-2 times this; empty: plain normal noise",
        above=0,
        maximum=100,
    )
