"""Settings: released files load as they are, mistakes are named, every key has a reader."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from miscc.config import flatten, to_yaml
from miscc.errors import ConfigError
from miscc.settings import lookup, schema_of, setting, settings_of
from models import SYSTEMS
from models.choice import find_system, system_parts
from models.settings import MatchingSettings
from training.settings import ENCODER_PARTS, GAN_PARTS, keys_without_effect, load_config

ROOT = Path(__file__).parents[1]

# The keys and values of the authors' files, in short; comments and order are ours.
SSA_BIRD = """
CONFIG_NAME: 'bird_sloss01'
DATASET_NAME: 'birds'
DATA_DIR: 'data/birds'
GPU_ID: 0
WORKERS: 1
B_VALIDATION: True
RESTORE: False
loss: 'hinge'
TREE: {BRANCH_NUM: 1, BASE_SIZE: 256}
TRAIN: {NF: 64, BATCH_SIZE: 24, MAX_EPOCH: 600, NET_G: '', WARMUP_EPOCHS: 100, GSAVE_INTERVAL: 10, DSAVE_INTERVAL: 10}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10, DAMSM_NAME: 'DAMSMencoders/bird/text_encoder200.pth'}
"""
ATTN_BIRD = """
CONFIG_NAME: 'attn2'
DATASET_NAME: 'birds'
DATA_DIR: '../data/birds'
GPU_ID: 0
WORKERS: 4
TREE:
    BRANCH_NUM: 3
TRAIN:
    FLAG: True
    NET_G: ''
    B_NET_D: True
    BATCH_SIZE: 20
    MAX_EPOCH: 600
    SNAPSHOT_INTERVAL: 50
    DISCRIMINATOR_LR: 0.0002
    GENERATOR_LR: 0.0002
    NET_E: '../DAMSMencoders/bird/text_encoder200.pth'
    SMOOTH: {GAMMA1: 4.0, GAMMA2: 5.0, GAMMA3: 10.0, LAMBDA: 5.0}
GAN: {DF_DIM: 64, GF_DIM: 32, Z_DIM: 100, R_NUM: 2}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10}
"""
DAMSM_BIRD = """
CONFIG_NAME: 'DAMSM'
DATASET_NAME: 'birds'
DATA_DIR: '../data/birds'
GPU_ID: 0
WORKERS: 4
TREE: {BRANCH_NUM: 1, BASE_SIZE: 299}
TRAIN:
    FLAG: True
    NET_E: ''
    BATCH_SIZE: 48
    MAX_EPOCH: 600
    SNAPSHOT_INTERVAL: 50
    ENCODER_LR: 0.002
    RNN_GRAD_CLIP: 0.25
    SMOOTH: {GAMMA1: 4.0, GAMMA2: 5.0, GAMMA3: 10.0}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10}
"""


def write(tmp_path, text):
    path = tmp_path / "experiment.yml"
    path.write_text(text)
    return path


def test_ssa_gan_file_loads_with_the_published_settings(tmp_path):
    cfg = load_config(write(tmp_path, SSA_BIRD))
    assert cfg.GAN.NAME == "ssa_gan" and cfg.CONFIG_NAME == "bird_sloss01"
    assert (cfg.TRAIN.GENERATOR_LR, cfg.TRAIN.DISCRIMINATOR_LR) == (1e-4, 4e-4)
    assert cfg.TRAIN.BETAS == [0.0, 0.9] and cfg.TRAIN.DAMSM_WEIGHT == 0.05
    assert cfg.TRAIN.WARMUP_EPOCHS == 100 and cfg.B_VALIDATION is True
    smooth = cfg.TRAIN.SMOOTH
    assert (smooth.GAMMA1, smooth.GAMMA2, smooth.GAMMA3, smooth.LAMBDA) == (5, 5, 10, 1)


def test_damsm_file_loads_with_its_own_defaults(tmp_path):
    cfg = load_config(write(tmp_path, DAMSM_BIRD), command="damsm")
    assert cfg.TRAIN.BETAS == [0.5, 0.999] and cfg.TRAIN.ENCODER_LR == 0.002 and cfg.TREE.BASE_SIZE == 299
    assert load_config(write(tmp_path, "DATASET_NAME: coco"), command="damsm").TRAIN.BATCH_SIZE == 48


@pytest.mark.parametrize(
    ("given", "system"),
    [
        ({}, "ssa_gan"),
        ({"TREE.BRANCH_NUM": 1}, "ssa_gan"),
        ({"TREE.BRANCH_NUM": 3}, "attn_gan"),
        ({"TRAIN.NET_E": "text_encoder.pth"}, "attn_gan"),
        ({"TRAIN.NET_E": ""}, "ssa_gan"),
        ({"TREE.BRANCH_NUM": 3, "GAN.B_DCGAN": True}, "attn_dcgan"),
        ({"TREE.BRANCH_NUM": 3, "GAN.NAME": "SSA-GAN"}, "ssa_gan"),
    ],
)
def test_a_file_without_a_name_says_its_system_by_its_keys(given, system):
    assert find_system(given, ()) == system


@pytest.mark.parametrize("name", ["AttnGAN", "attn_gan", "Attn-GAN", "attn gan"])
def test_systems_may_be_spelled_as_their_papers_do(name):
    assert find_system({"GAN.NAME": name}, SYSTEMS) == "attn_gan"


def test_attn_gan_file_reads_completely(tmp_path):
    path = write(tmp_path, ATTN_BIRD)
    cfg = load_config(path, [("GAN.NAME", "ssa_gan")])
    assert cfg.TEXT.DAMSM_NAME == "../DAMSMencoders/bird/text_encoder200.pth"
    # As SSA-GAN its stages mean nothing, and that is said.
    ignored = keys_without_effect(path, [("GAN.NAME", "ssa_gan")])
    assert "TREE.BRANCH_NUM" in ignored
    assert "TRAIN.BATCH_SIZE" not in ignored


EVAL_BIRD = """
CONFIG_NAME: 'attn2'
DATASET_NAME: 'birds'
DATA_DIR: '../data/birds'
GPU_ID: 3
WORKERS: 1
B_VALIDATION: False
TREE: {BRANCH_NUM: 3}
TRAIN: {FLAG: False, NET_G: '../models/bird_AttnGAN2.pth', B_NET_D: False, BATCH_SIZE: 100,
        NET_E: '../DAMSMencoders/bird/text_encoder200.pth'}
GAN: {DF_DIM: 64, GF_DIM: 32, Z_DIM: 100, R_NUM: 2}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 10, WORDS_NUM: 25}
"""
COCO_DCGAN = """
CONFIG_NAME: 'attnDCGAN2'
DATASET_NAME: 'coco'
DATA_DIR: '../data/coco'
GPU_ID: 1
WORKERS: 4
TREE: {BRANCH_NUM: 3}
TRAIN: {FLAG: True, NET_G: '', B_NET_D: True, BATCH_SIZE: 14, MAX_EPOCH: 120, SNAPSHOT_INTERVAL: 5,
        DISCRIMINATOR_LR: 2e-4, GENERATOR_LR: 2e-4, NET_E: '../DAMSMencoders/coco/text_encoder100.pth',
        SMOOTH: {GAMMA1: 4.0, GAMMA2: 5.0, GAMMA3: 10.0, LAMBDA: 50.0}}
GAN: {DF_DIM: 96, GF_DIM: 48, Z_DIM: 100, R_NUM: 3, B_DCGAN: True, B_ATTENTION: True, CONDITION_DIM: 100}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 5, WORDS_NUM: 12}
"""
EVERY_KEY_OF_SEMA = """
CONFIG_NAME: 'coco'
DATASET_NAME: 'coco'
DATA_DIR: '../data/coco'
GPU_ID: 0
CUDA: True
WORKERS: 4
RNN_TYPE: 'LSTM'
B_VALIDATION: True
RESTORE: False
USE_SN: False
loss: 'hinge'
TREE: {BRANCH_NUM: 1, BASE_SIZE: 256}
TRAIN: {FLAG: True, NET_G: 'netG_120.pth', B_NET_D: True, BATCH_SIZE: 48, MAX_EPOCH: 121, NF: 32, SNAPSHOT_INTERVAL: 1}
GAN: {Z_DIM: 100}
TEXT: {EMBEDDING_DIM: 256, CAPTIONS_PER_IMAGE: 5, WORDS_NUM: 18, DAMSM_NAME: '../DAMSMencoders/coco/text_encoder100.pth'}
"""


@pytest.mark.parametrize(
    ("text", "system", "values"),
    [
        (ATTN_BIRD, "attn_gan", {"TRAIN.SMOOTH.LAMBDA": 5.0, "GAN.R_NUM": 2, "TREE.BRANCH_NUM": 3}),
        (EVAL_BIRD, "attn_gan", {"TRAIN.FLAG": False, "TEXT.WORDS_NUM": 25, "TRAIN.BATCH_SIZE": 100}),
        (COCO_DCGAN, "attn_dcgan", {"TRAIN.GENERATOR_LR": 2e-4, "GAN.B_DCGAN": True, "TRAIN.SMOOTH.LAMBDA": 50.0}),
        (EVERY_KEY_OF_SEMA, "ssa_gan", {"TRAIN.NF": 32, "USE_SN": False, "TRAIN.NET_G": "netG_120.pth"}),
    ],
)
def test_files_of_the_other_systems_read_completely(tmp_path, text, system, values):
    cfg = load_config(write(tmp_path, text))
    assert cfg.GAN.NAME == system
    assert {name: lookup(cfg, name) for name in values} == values


def test_a_system_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no system 'attn_gan'.*ssa_gan"):
        find_system({"TREE.BRANCH_NUM": 3}, ["ssa_gan"])
    with pytest.raises(ConfigError, match="no system 'sa_gan'.*did you mean ssa_gan"):
        load_config(write(tmp_path, "GAN: {NAME: sa_gan}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN: {BATCHSIZE: 8}", "TRAIN.BATCHSIZE: no such setting; did you mean TRAIN.BATCH_SIZE"),
        ("BATCH_SIZE: 8", "BATCH_SIZE: no such setting; did you mean TRAIN.BATCH_SIZE"),
        ("TRAIN: {BATCH_SIZE: many}", "TRAIN.BATCH_SIZE: must be a whole number"),
        ("TRAIN: {BATCH_SIZE: 0}", "TRAIN.BATCH_SIZE: must be greater than 0"),
        ("TRAIN: {MAX_EPOCH: 0}", "TRAIN.MAX_EPOCH: must be greater than 0"),
        ("TRAIN: {BATCH_SIZE: 2.5}", "TRAIN.BATCH_SIZE: must be a whole number"),
        ("TRAIN: {GENERATOR_LR: .nan}", "TRAIN.GENERATOR_LR: must be a number"),
        ("TRAIN: {BETAS: [0.9]}", "TRAIN.BETAS: must be two numbers"),
        ("B_VALIDATION: 1", "B_VALIDATION: must be True or False"),
        ("GAN: {SSCBN: papper}", "GAN.SSCBN: must be one of code, paper"),
        ("loss: wgan", "loss: must be one of hinge"),
        ("TRAIN: {AUGMENT: none}", "TRAIN.AUGMENT: must be one of '', translation, cutout, 'translation,cutout', "),
        ("TRAIN: {MAX_EPOCH: }", "TRAIN.MAX_EPOCH: has no value"),
        ("- a\n- b", "must hold KEY: value lines"),
        ("TRAIN: [", "not valid YAML"),
        ("TRAIN: 3", "TRAIN: no such setting"),
        # One line each, although YAML or Python would raise something else, hang, or take another value in silence.
        ("TRAIN: &a {NF: *a}", "an alias that refers to itself"),
        ("TRAIN: &a [*a]", "an alias that refers to itself"),
        ("TREE: {BRANCH_NUM: 100000}", "TREE.BRANCH_NUM: must be at most 8"),
        ("TREE: {BASE_SIZE: 1000000000}", "TREE.BASE_SIZE: must be at most 8,192"),
        ("TRAIN: {NF: '²'}", "TRAIN.NF: must be a whole number.*not '²'"),
        ("SEED: !!int x", "not valid YAML: invalid literal"),
        ("SEED: !!int ''", "not valid YAML"),
        ("B_VALIDATION: !!bool x", "not valid YAML"),
        ("SEED: !!timestamp x", "not valid YAML"),
        ("SEED: 2024-13-45", "SEED: must be a whole number.*not '2024-13-45'"),
        ("SEED: 12:30:45", "SEED: must be a whole number.*not '12:30:45'"),
        ("TRAIN: {GENERATOR_LR: 1:30.5}", "TRAIN.GENERATOR_LR: must be a number"),
        (f"SEED: {'9' * 400}", r"SEED: must be at most 4,294,967,295, not 9+\.\.\.9+$"),
        (f"SEED: {'9' * 5000}", "not valid YAML: Exceeds the limit"),
        (f"TRAIN: {{GENERATOR_LR: {'9' * 400}}}", "TRAIN.GENERATOR_LR: must be a number"),
        ("TRAIN: {NF: 8, NF: 16}", "'NF' is given twice.*line 1"),
        ("TRAIN: {NF: 8}\nSEED: 1\nTRAIN: {BATCH_SIZE: 8}", "'TRAIN' is given twice.*line 3"),
        ("TRAIN.NF: 8\nTRAIN: {NF: 16}", "'TRAIN.NF' is given twice"),
        ("GPU_ID: -2", "GPU_ID: must be at least -1"),
        ("GPU_ID: [0]", r"GPU_ID: must be a whole number, not \[0\]$"),
        ("SEED: {}", r"SEED: must be a whole number, for example 100, not \{\}"),
        ("CONFIG_NAME: {}", r"CONFIG_NAME: must be a text.* not \{\}"),
        ("TRAIN: {BETAS: {}}", r"TRAIN.BETAS: must be a list of numbers.* not \{\}"),
        ('DATA_DIR: "a\\0b"', "DATA_DIR: must be a text"),
        ("TRAIN: " + "[" * 5000, "nested too deeply"),
        ("#" + "x" * 300_000, "has 300,001 characters"),
    ],
    ids=lambda text: text[:30],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_an_alias_bomb_is_refused(tmp_path):
    """Ten aliases of ten aliases, ten times: ten thousand million numbers."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="too many values"):
        load_config(write(tmp_path, "\n".join(lines)))


def test_aliases_within_bounds_and_texts_that_look_like_numbers_load(tmp_path):
    text = "TRAIN: {GENERATOR_LR: &lr 1e-3, DISCRIMINATOR_LR: *lr}\nCONFIG_NAME: 2024-01-02\nOUTPUT_DIR: 12:30:45"
    cfg = load_config(write(tmp_path, text))
    assert cfg.TRAIN.GENERATOR_LR == cfg.TRAIN.DISCRIMINATOR_LR == 1e-3
    assert (cfg.CONFIG_NAME, cfg.OUTPUT_DIR) == ("2024-01-02", "12:30:45")
    assert load_config(write(tmp_path, to_yaml(cfg))) == cfg


def test_texts_keep_their_spelling_and_groups_may_be_empty(tmp_path):
    text = "CONFIG_NAME: 1.10\nOUTPUT_DIR: 1_0\nSEED: 1_0\nTRAIN: {GENERATOR_LR: 0.10}\nTREE: {}\nTEXT:\n"
    cfg = load_config(write(tmp_path, text))
    assert (cfg.CONFIG_NAME, cfg.OUTPUT_DIR, cfg.SEED, cfg.TRAIN.GENERATOR_LR) == ("1.10", "1_0", 10, 0.1)
    assert load_config(write(tmp_path, to_yaml(cfg))) == cfg


def test_refusals_cut_what_is_long(tmp_path):
    for text in ("TRAIN: {NF: [" + "1, " * 5000 + "1]}", "TRAIN: {NF: '" + "x" * 5000 + "'}", "x" * 5000 + ": 1"):
        with pytest.raises(ConfigError) as error:
            load_config(write(tmp_path, text))
        assert len(str(error.value)) < 600
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, ""), [("TRAIN.NF", "{" * 5000)])
    assert len(str(error.value)) < 600


def test_numbers_with_leading_zeros_are_refused_with_the_remedy(tmp_path):
    """YAML 1.1 reads 010 as 8."""
    said = r"begins with 0, which YAML reads as a number to base 8; write {}, or '{}' in quotes"
    for text, plain in (("010", "10"), ("-017", "-17"), ("00", "0"), ("0_7", "7"), ("!!int 010", "10")):
        written = text.split()[-1]
        with pytest.raises(ConfigError, match=f"experiment.yml: '{written}' in line 2 {said.format(plain, written)}"):
            load_config(write(tmp_path, f"CONFIG_NAME: x\nSEED: {text}\n"))
        with pytest.raises(ConfigError, match=f"--set 'SEED': '{written}' {said.format(plain, written)}"):
            load_config(write(tmp_path, ""), [("SEED", text)])

    # Texts in quotes, texts of --set, and zeros that change nothing.
    assert load_config(write(tmp_path, "CONFIG_NAME: '010'")).CONFIG_NAME == "010"
    assert load_config(write(tmp_path, ""), [("CONFIG_NAME", "010"), ("SEED", "0")]).CONFIG_NAME == "010"


def test_every_number_has_bounds():
    for part in [*GAN_PARTS, *ENCODER_PARTS, *(part for name in SYSTEMS for part in system_parts(name))]:
        for one in settings_of(part).values():
            if one.type in (int, float):
                assert one.minimum is not None or one.above is not None, one.key
                assert one.maximum is not None or one.below is not None, one.key


def test_the_largest_sizes_do_not_overflow_in_a_dry_run(tmp_path):
    from training.dry_run import describe

    sizes = [("TREE.BASE_SIZE", "8192"), ("TRAIN.NF", "4096"), ("GAN.Z_DIM", "65536"), ("TEXT.EMBEDDING_DIM", "65536")]
    assert "GiB" in describe(load_config(write(tmp_path, "GAN: {NAME: df_gan}\nDATA_DIR: nowhere"), sizes))


def test_a_missing_file_names_those_that_are_there():
    with pytest.raises(ConfigError, match="cfg/brid.yml: no such settings file"):
        load_config("cfg/brid.yml")


def test_scientific_notation_and_overrides(tmp_path):
    path = write(tmp_path, "TRAIN: {GENERATOR_LR: 1e-4, NF: 32}")  # YAML 1.1 reads 1e-4 as a string
    cfg = load_config(path, [("TRAIN.NF", "8"), ("TRAIN.BETAS", "[0.5, 0.99]"), ("TEXT.DAMSM_NAME", "a b.pth")])
    assert cfg.TRAIN.GENERATOR_LR == 1e-4 and cfg.TRAIN.NF == 8
    assert cfg.TRAIN.BETAS == [0.5, 0.99] and cfg.TEXT.DAMSM_NAME == "a b.pth"


def test_fine_tuning_changes_the_weight_of_damsm_unless_it_is_given(tmp_path):
    path = write(tmp_path, "TRAIN: {FINETUNE_ENCODERS: True}")
    assert load_config(path).TRAIN.DAMSM_WEIGHT == 0.1
    assert load_config(path, [("TRAIN.DAMSM_WEIGHT", "0.3")]).TRAIN.DAMSM_WEIGHT == 0.3


def test_saved_settings_load_again(tmp_path):
    cfg = load_config(write(tmp_path, SSA_BIRD))
    again = load_config(write(tmp_path, to_yaml(cfg)))
    assert again == cfg


@pytest.mark.parametrize("path", sorted((ROOT / "cfg").rglob("*.yml")), ids=lambda path: path.stem)
def test_our_own_files_load_without_a_warning(path):
    command = "damsm" if path.parent.name == "DAMSM" else "gan"
    assert load_config(path, command=command).CONFIG_NAME
    assert keys_without_effect(path, command=command) == []


def test_flatten_and_lookup():
    assert flatten({"A": {"B": 1, "C": {"D": 2}}, "E": 3}) == {"A.B": 1, "A.C.D": 2, "E": 3}
    assert flatten({"A": {"B": {}}}) == {"A.B": {}}
    assert lookup({"A": {"B": {"C": 7}}}, "A.B.C") == 7


def test_a_group_of_keys_is_no_setting():
    @dataclass(frozen=True)
    class Group:
        weight: float = setting("TRAIN.SMOOTH", 0.0, "a key that TRAIN.SMOOTH.GAMMA1 makes a group")

    with pytest.raises(ValueError, match="TRAIN.SMOOTH: is a setting and the group of TRAIN.SMOOTH.GAMMA1"):
        schema_of([Group, MatchingSettings])


def test_every_setting_is_read_somewhere():
    """By its field, as `settings.nf`, or in the loops by its key, as `cfg.TRAIN.NF`; a declaration alone is no reader."""
    rooms = ("models", "datasets", "training", "sampling", "eval")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    parts = [*GAN_PARTS, *ENCODER_PARTS, *(part for name in SYSTEMS for part in system_parts(name))]
    unread = [
        one.key
        for part in parts
        for field, one in settings_of(part).items()
        if not re.search(rf"\.({field}|{one.key.split('.')[-1]})\b", source)
    ]
    assert unread == []


def test_the_parts_of_a_system_agree_on_its_defaults():
    for name in SYSTEMS:
        defaults = {}
        for part in system_parts(name):
            for one in settings_of(part).values():
                # SEMA's discriminator is SSA-GAN's class, whose width follows G's.
                if one.key != "TRAIN.NF":
                    assert defaults.setdefault(one.key, one.default) == one.default, (name, one.key)
