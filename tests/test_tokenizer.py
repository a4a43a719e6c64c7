"""The tokenizer: what transformers gives for the same files, and text that comes piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.models import tiny_llama, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from kvist.engine.models.files import ModelFilesError, model_path
from kvist.engine.tokenizer import ChatTemplateError, Tokenizer, load_tokenizer

TEXTS = [
    "Hello world! It's the cache, and that's all.",
    "  def f(x):\n\treturn x**2\n\n\n# done  ",
    "naïve café 北京 🎉👩‍👩‍👧 Ω",
    "<|im_start|>user\nhi<|im_end|>\n",
    "trailing space ",
    "",
]
NUMBERS = "In 2024, 12345 + 678 = 13023;  7 Ⅷ ½ x86"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 < 2 & 'a'?"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Why? 🎉"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_a_folder_gives_the_ids_text_and_chats_of_transformers(
    folder: Path, tiny: Tokenizer
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, NUMBERS]:
        ids = tiny.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert tiny.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert tiny.apply_chat_template(CHAT, add_generation_prompt=prompt) == expected
    assert tiny.vocab_size == len(theirs)
    assert (tiny.bos_token_id, tiny.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


@pytest.mark.model
def test_the_demo_gives_the_ids_and_chats_of_transformers() -> None:
    path = model_path("demo")
    ours = load_tokenizer("demo")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    # transformers knows nothing of tokenizer.ggml.pre: for "smollm" single digits are split off
    # first (llama.cpp's llama-vocab, and the model's own tokenizer.json).
    theirs._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs._tokenizer.pre_tokenizer]
    )
    assert ours.encode(NUMBERS) == theirs(NUMBERS)["input_ids"]
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT) == rendered
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@settings(deadline=None)
@given(text=st.text(), cuts=st.lists(st.integers(1, 5), max_size=30))
def test_text_that_comes_in_pieces_is_the_text_that_comes_at_once(
    tiny: Tokenizer, text: str, cuts: list[int]
) -> None:
    ids = tiny.encode(text)
    stream, given_text, at = tiny.detokenizer(), "", 0
    for count in [*cuts, len(ids)]:
        new = stream.push(ids[at : at + count])
        at += count
        assert "\ufffd" not in new or "\ufffd" in text
        given_text += new
    assert given_text + stream.flush() == tiny.decode(ids)


@given(ids=st.lists(st.integers(3, 258), max_size=40))
def test_bytes_that_are_no_characters_still_add_up(tiny: Tokenizer, ids: list[int]) -> None:
    stream = tiny.detokenizer()
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) + stream.flush() == tiny.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tiny: Tokenizer) -> None:
    ids = tiny.encode("a🎉b")
    assert len(ids) == 6
    stream = tiny.detokenizer()
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "🎉", "b"]
    assert stream.flush() == ""


def test_an_output_cut_inside_a_character_ends_with_the_replacement(tiny: Tokenizer) -> None:
    stream = tiny.detokenizer()
    assert stream.push(tiny.encode("ok🎉")[:-1]) == ""
    assert stream.flush() == "ok\ufffd"


def test_special_tokens_of_an_output_are_not_text(tiny: Tokenizer) -> None:
    stream = tiny.detokenizer(context=tiny.encode("hello"))
    assert stream.push(tiny.encode(" world<|im_end|>")) == " world"


def with_template(tmp_path: Path, template: object, **more: Any) -> Tokenizer:
    folder = tmp_path / "templated"
    folder.mkdir()
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    written = {"chat_template": template, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return load_tokenizer(folder)


def test_templates_may_use_what_transformers_gives_them(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ extra }}"
    )
    tokenizer = with_template(tmp_path, template, bos_token={"content": "<|im_start|>"})
    text = tokenizer.apply_chat_template(
        [{"role": "skip", "content": "no"}, {"role": "user", "content": "yes"}],
        tools=[{"name": "<f>"}],
        extra="!",
    )
    assert text == '<|im_start|>yes[{"name": "<f>"}]4!'


def test_a_template_in_its_own_file_wins_and_of_several_the_default_is_taken(
    tmp_path: Path,
) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert with_template(tmp_path, named).apply_chat_template([]) == "d"
    (tmp_path / "templated" / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path / "templated").apply_chat_template([]) == "file"


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        tokenizer.apply_chat_template(CHAT)


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ChatTemplateError, match="unsafe"):
        tokenizer.apply_chat_template(CHAT)


def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        with_template(tmp_path, None).apply_chat_template(CHAT)


def test_a_broken_template_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="chat template"):
        with_template(tmp_path, "{% if %}")


def test_files_without_a_usable_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFilesError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFilesError, match="cannot be read"):
        load_tokenizer(tmp_path / "empty")


def write_gguf_tokenizer(path: Path, **changes: Any) -> Path:
    """A GGUF file with the tiny vocabulary and no tensors; None leaves a key out."""
    document = json.loads(tiny_tokenizer().to_str())
    vocab = document["model"]["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {**values, **changes}.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_vocabulary_gives_the_ids_of_the_same_tokenizer_json(
    tmp_path: Path, tiny: Tokenizer
) -> None:
    tokenizer = load_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf"))
    for text in [*TEXTS, NUMBERS]:
        assert tokenizer.encode(text) == tiny.encode(text)
    assert tokenizer.eos_token_ids == (2,)


def test_a_gguf_that_asks_for_it_gets_a_bos_before_every_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", add_bos_token=True))
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1


def test_llama3_words_split_numbers_in_threes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", pre="llama-bpe"))
    assert tokenizer.decode(tokenizer.encode("the 12345 that's\n")) == "the 12345 that's\n"
    assert tokenizer.encode("the")[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model 'llama' is not supported"),
        ({"pre": "qwen2"}, r"tokenizer\.ggml\.pre 'qwen2' is not supported"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
    ],
)
def test_gguf_vocabularies_of_other_kinds_are_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFilesError, match=message):
        load_tokenizer(write_gguf_tokenizer(tmp_path / "t.gguf", **changes))
