"""Tokenizer and chat format: ids equal to transformers' ids, no special token from text, streamed text complete.

With Mistral's tokenizer, runs of spaces are left out of the comparison.
"""

import random
import re

import pytest
from conftest import SENTENCES

import danube3
from danube3 import IGNORE_INDEX
from data import toy

TEXTS = [
    "Hello world",
    "a  b\n\nc \u00e9 \U0001f600",
    "tab\there",
    "",
    "12 345",
    "</s>",
    "<s>hi</s>",
    "x </s> y",
    "<|answer|>=> yes",
    "\u4f60\u597d",
    "trailing  ",
    *SENTENCES,
]


@pytest.fixture(scope="module")
def mistral():
    """The published tokenizer, from the package mistral-common."""
    from importlib.resources import files

    return danube3.Tokenizer(files("mistral_common") / "data" / "tokenizer.model.v1", add_bos=True)


def transformers_tokenizer(tokenizer, folder):
    """transformers' AutoTokenizer of a folder that we wrote."""
    from transformers import AutoTokenizer

    model = danube3.Danube3(danube3.DanubeConfig(8, 8, 1, 1, 1, 2, 0.1, vocab_size=tokenizer.vocab_size))
    danube3.save_checkpoint(folder, model, tokenizer)
    return AutoTokenizer.from_pretrained(folder)


def test_published_ids(mistral):
    """The model card's example [paper]. transformers gives the same ids with the Mistral tokenizer."""
    conversation = [{"role": "user", "content": "Why is drinking water so healthy?"}]
    ids, labels = danube3.render_chat(conversation, mistral, add_generation_prompt=True)
    assert ids == [
        523,
        28766,
        14350,
        447,
        28766,
        28767,
        7638,
        349,
        11605,
        2130,
        579,
        7783,
        28804,
        2,
        523,
        28766,
        24115,
        28766,
        28767,
    ]
    assert labels == [IGNORE_INDEX] * len(ids)
    ids, labels = danube3.render_chat([*conversation, {"role": "assistant", "content": "Because it is."}], mistral)
    assert ids[-5:] == labels[-5:] == [17098, 378, 349, 28723, 2]
    assert labels[:-5] == [IGNORE_INDEX] * (len(ids) - 5)


@pytest.mark.parametrize("which", ["toy", "mistral"])
def test_equal_to_transformers(which, tokenizer, mistral, tmp_path):
    ours = tokenizer if which == "toy" else mistral
    theirs = transformers_tokenizer(ours, tmp_path / "folder")
    # transformers 5 rebuilds the merges from the file. It puts Mistral's pieces of several spaces first, although they
    # have the lowest score. sentencepiece, which the model was trained with, puts them last. So no runs of spaces here.
    squeeze = (lambda text: re.sub(" +", " ", text)) if which == "mistral" else str
    for text in map(squeeze, TEXTS):
        if "<s>" not in text and "</s>" not in text:  # theirs turns this text into special tokens, ours must not
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
            assert ours.encode_prompt(text) == theirs.encode(text), text
    conversation = [
        {"role": role, "content": squeeze(text)}
        for role, text in zip(
            ["user", "assistant"] * 4,
            ["Hi", "Ada lives  in Marrow.", " leading", "a\nb", "\u00e9t\u00e9 \U0001f600", "", "2 + 2?", "= 4"],
        )
    ]
    for length in range(1, 9):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                conversation[:length], add_generation_prompt=prompt, return_dict=False
            )
            assert danube3.render_chat(conversation[:length], ours, prompt)[0] == expected
    with pytest.raises(Exception, match="System role not supported"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])


def test_text_never_becomes_a_special_token(tokenizer):
    """Only the two </s> that end the messages are special tokens."""
    for text in TEXTS:
        assert not {0, 1, 2} & set(tokenizer.encode(text)), text
        ids, _ = danube3.render_chat(
            [{"role": "user", "content": text}, {"role": "assistant", "content": text}], tokenizer
        )
        assert [i for i in ids if i < 3] == [2, 2] and ids[-1] == 2
    assert tokenizer.encode_prompt("</s>")[0] == 1 and 2 not in tokenizer.encode_prompt("</s>")


def test_labels_are_the_answers(tokenizer):
    """A label for each token of an answer and its </s>, and for no other token."""
    messages = [
        {"role": role, "content": text}
        for role, text in [
            ("user", "Who?"),
            ("assistant", "Ada lives in Marrow."),
            ("user", "And?"),
            ("assistant", "She has 2 geese."),
        ]
    ]
    ids, labels = danube3.render_chat(messages, tokenizer)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels))
    targets = [i for i in labels if i != IGNORE_INDEX]
    ends = [i for i, label in enumerate(targets) if label == 2]
    assert len(ends) == 2 and ends[-1] == len(targets) - 1
    assert tokenizer.decode(targets[: ends[0]]) == "Ada lives in Marrow."
    assert tokenizer.decode(targets[ends[0] + 1 : -1]) == "She has 2 geese."


@pytest.mark.parametrize(
    "message",
    [{"role": "system", "content": "x"}, {"role": "tool", "content": "x"}, {"role": "user"}, {"content": "x"}],
)
def test_messages_refused(message, tokenizer):
    with pytest.raises(danube3.DanubeError, match="needs a text and the role user or assistant, but this is"):
        danube3.render_chat([message], tokenizer)


@pytest.mark.parametrize("which", ["toy", "mistral"])
def test_streaming_loses_nothing(which, tokenizer, mistral):
    """Prompt and streamed text together are the whole text, wherever the prompt ends. No half character is emitted."""
    tokenizer = tokenizer if which == "toy" else mistral
    for text in [*SENTENCES, "one two  three\n four", "\U0001f600\U0001f601 \u4f60\u597d!"]:
        ids = tokenizer.encode_prompt(text)
        for cut in range(1, len(ids)):
            if "\ufffd" in tokenizer.decode(ids[:cut]):
                continue  # a prompt has no half characters
            stream = danube3.StreamingDetokenizer(tokenizer, ids[:cut])
            pieces = [stream.push(i) for i in ids[cut:]]
            assert not any("\ufffd" in piece for piece in pieces)
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text


@pytest.mark.parametrize("first", [3, 0])
def test_streaming_random_ids(tokenizer, first):
    """Streamed text equals the text decoded at once, also with broken bytes, special tokens and ids of a padded
    vocabulary."""
    draw = random.Random(0)
    prompt = tokenizer.encode_prompt("Ada")
    for _ in range(50):
        ids = [draw.randrange(first, tokenizer.vocab_size + 10) for _ in range(20)]
        stream = danube3.StreamingDetokenizer(tokenizer, prompt)
        assert "Ada" + "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(prompt + ids)


def test_incomplete_bytes_are_emitted_at_the_end(tokenizer):
    """A half character has no text until flush is called. Then it becomes replacement characters."""
    ids = tokenizer.encode("\U0001f422")[:-1]  # a turtle is not in the vocabulary: four bytes, here three of them
    stream = danube3.StreamingDetokenizer(tokenizer, tokenizer.encode_prompt("Ada"))
    assert "".join(map(stream.push, ids)).strip() == "" and "\ufffd" in stream.flush()


def test_settings_and_determinism(tokenizer, tmp_path):
    """Training twice gives the same file. Special ids, byte pieces, text unchanged, single digits."""
    again = toy.train_tokenizer(SENTENCES * 3, 330, tmp_path / "again.model")
    assert again.sha256 == tokenizer.sha256
    sp = tokenizer.sp
    assert [sp.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert sum(sp.is_byte(i) for i in range(sp.vocab_size())) == 256
    assert (
        tokenizer.decode(tokenizer.encode("  a   b \u2160 \ufb01")) == "  a   b \u2160 \ufb01"
    )  # nothing is normalized away
    digits = [sp.id_to_piece(i) for i in tokenizer.encode("1234 2024") if not sp.is_byte(i)]
    assert all(len(piece.strip("\u2581")) <= 1 for piece in digits)


def test_bad_tokenizer_files(tmp_path):
    """A message names the file and what to do."""
    with pytest.raises(danube3.DanubeError, match=r"none\.model is missing or damaged .*No such file.*: copy it again"):
        danube3.Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a tokenizer")
    with pytest.raises(danube3.DanubeError, match=r"bad\.model is missing or damaged .*copy it again"):
        danube3.Tokenizer(tmp_path / "bad.model")
    with pytest.raises(danube3.DanubeError, match="another vocabulary size"):
        toy.train_tokenizer(["a b"], 5000, tmp_path / "big.model")


def test_text_that_is_no_text(tokenizer):
    """Half a surrogate pair, as in bytes that are no text, is read as a question mark."""
    assert tokenizer.encode("broken \udcff") == tokenizer.encode("broken ?")
