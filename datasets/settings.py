"""Settings of the data: which data set, where it lies, how it is read. Passed to what reads images or captions."""

from dataclasses import dataclass

from miscc.settings import setting


@dataclass(frozen=True)
class DatasetSettings:
    """Which data set."""

    dataset: str = setting("DATASET_NAME", "birds", "birds, coco, folder, flickr or toybirds")


@dataclass(frozen=True)
class DataSettings(DatasetSettings):
    """Which data set, and how its images and captions are read."""

    data_dir: str = setting("DATA_DIR", "", "where the data lies; empty: data/<DATASET_NAME>")
    keep_decoded: bool = setting("DATA_CACHE", False, "keep decoded, resized images in one file")
    cache_dir: str = setting("DATA_CACHE_DIR", "", "the folder of that file; empty: DATA_DIR/cache")
    skip_broken: bool = setting("SKIP_BROKEN", False, "leave out images that cannot be read instead of stopping")
    workers: int = setting("WORKERS", 4, "processes that read images; 0: none beside the main one", maximum=1024)
    captions_per_image: int = setting(
        "TEXT.CAPTIONS_PER_IMAGE", 10, "captions of an image that are used at most", above=0
    )
    similar_batches: float = setting(
        "TRAIN.SIMILAR_BATCHES",
        0.0,
        "share of the batches whose captions resemble each other, so that DAMSM and D's mismatched pairs differ in details",
        maximum=1,
    )
    max_words: int = setting("TEXT.WORDS_NUM", 18, "words of a caption at most", above=0, maximum=4096)

    def __post_init__(self) -> None:
        if not self.data_dir:
            object.__setattr__(self, "data_dir", f"data/{self.dataset}")
