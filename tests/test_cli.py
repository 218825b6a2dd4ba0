"""The command line: the numbers of the Python API, and mistakes told in one line with exit code 2."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import IFR, Attribution, FlashTrace, Span, __version__, reasoner
from flashtrace_plugin.cli import progress
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.cli.inputs import in_flags
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.loading import checked_device, load, write
from flashtrace_plugin.models.read.layouts import supported_families
from tests.tiny import tiny, tiny_tokenizer

PROMPT = "The key of the red box is in the garden. Where is the key?\n"
GENERATION = "<think>red box</think>In the garden."
TEXTS = ["--prompt", PROMPT, "--generation", GENERATION]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk; it never ends a text by itself."""
    path = tmp_path_factory.mktemp("model")
    model = tiny("qwen3")
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder))


def call(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def refused(*arguments):
    """The message of a call that must fail, told in one line and without a traceback."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
    return result.stderr


def test_attribute_gives_the_numbers_of_the_python_api(folder, loaded, tmp_path):
    saved, report = tmp_path / "a.json", tmp_path / "a.html"
    result = call(
        "attribute",
        "--model",
        folder,
        *TEXTS,
        "--hops",
        2,
        "--method",
        "flashtrace",
        "--positions",
        "predicting",
        "--json",
        saved,
        "--html",
        report,
        "--top",
        3,
    )
    assert result.exit_code == 0, result.output
    expected = FlashTrace(*loaded, hops=2, positions="predicting").attribute(PROMPT, GENERATION)
    found = Attribution.load(saved)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.hop_scores, expected.hop_scores)
    assert found.target == expected.target and found.settings["positions"] == "predicting"
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>") and report.as_uri() in result.output
    assert (
        f"{expected.top(3)[2].score:#.3g}" in result.output and f"{expected.top(4)[3].score:#.3g}" not in result.output
    )


def test_other_methods_and_their_options(folder, loaded, tmp_path):
    saved = tmp_path / "a.json"
    assert call("attribute", "--model", folder, *TEXTS, "--method", "ifr", "--json", saved).exit_code == 0
    assert torch.equal(Attribution.load(saved).scores, IFR(*loaded).attribute(PROMPT, GENERATION).scores)
    options = ["--method", "flashtrace", "-o", 'ignore=["."]', "--option", "recursion=generation"]
    assert call("attribute", "--model", folder, *TEXTS, *options, "--json", saved).exit_code == 0
    expected = FlashTrace(*loaded, ignore=["."], recursion="generation").attribute(PROMPT, GENERATION)
    assert torch.equal(Attribution.load(saved).scores, expected.scores)


def test_texts_come_from_files_too(folder, tmp_path):
    prompt, generation, messages = tmp_path / "p.txt", tmp_path / "g.txt", tmp_path / "m.json"
    prompt.write_text(PROMPT, encoding="utf-8")
    generation.write_text(GENERATION, encoding="utf-8")
    messages.write_text(json.dumps([{"role": "user", "content": "Where?"}]), encoding="utf-8")
    saved = [tmp_path / f"{i}.json" for i in range(4)]
    common = ["attribute", "--model", folder]
    assert call(*common, *TEXTS, "--json", saved[0]).exit_code == 0
    files = ["--prompt-file", prompt, "--generation-file", generation]
    assert call(*common, *files, "--json", saved[1]).exit_code == 0
    piped = [*common, "--prompt-file", "-", "--generation", GENERATION, "--json", saved[2]]
    assert call(*piped, input=PROMPT).exit_code == 0
    first, *others = (Attribution.load(path) for path in saved[:3])
    assert all(torch.equal(first.scores, other.scores) for other in others)
    assert call(*common, "--messages-file", messages, "--generation", GENERATION, "--json", saved[3]).exit_code == 0
    chat = Attribution.load(saved[3])
    assert chat.text(chat.prompt) == "user: Where?\n"


def test_spans_are_positions_or_pieces_of_the_text(folder, tmp_path):
    saved = tmp_path / "a.json"
    common = ["attribute", "--model", folder, *TEXTS, "--json", saved]
    assert call(*common).exit_code == 0
    found = Attribution.load(saved)
    assert call(*common, "--target", found.target, "--reasoning", found.reasoning).exit_code == 0
    assert (Attribution.load(saved).target, Attribution.load(saved).reasoning) == (found.target, found.reasoning)
    assert call(*common, "--target", "garden", "--reasoning", "box").exit_code == 0
    found = Attribution.load(saved)
    assert "garden" in found.text(found.target) and "box" in found.text(found.reasoning)


def test_the_model_writes_when_no_generation_is_given(folder, loaded, tmp_path):
    saved = tmp_path / "a.json"
    result = call("attribute", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 5, "--json", saved)
    assert result.exit_code == 0, result.output
    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    found = Attribution.load(saved)
    assert list(found.token_ids) == ids[0].tolist() and found.prompt == Span(0, ids.shape[1] - 5)


def test_what_ends_a_text_is_not_part_of_it(loaded, monkeypatch):
    model, tokenizer = loaded
    free = write(model, tokenizer, PROMPT, 4).input_ids.tolist()
    start = len(tokenizer(PROMPT)["input_ids"])
    end = next(i for i in free[start:] if i != free[start])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    assert write(model, tokenizer, PROMPT, 9).input_ids.tolist() == free[: free.index(end, start)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, free[start]])
    with pytest.raises(InputError, match="ends the text right after the prompt"):
        write(model, tokenizer, PROMPT, 4)


def test_show_reads_what_attribute_saved(folder, tmp_path):
    saved, report = tmp_path / "a.json", tmp_path / "a.html"
    first = call("attribute", "--model", folder, *TEXTS, "--json", saved)
    again = call("show", saved, "--html", report)
    assert again.exit_code == 0 and report.exists()
    assert first.stdout.partition("Saved")[0] == again.stdout.partition("Report")[0]


def test_mass_by_units_is_printed_too(folder, tmp_path):
    saved = tmp_path / "a.json"
    result = call("attribute", "--model", folder, *TEXTS, "--by", "sentence", "--json", saved)
    best = Attribution.load(saved).by("sentence").top(1)[0]
    assert result.exit_code == 0
    assert best.unit.text[:12] in result.output and f"{100 * best.share:.1f} %" in result.output
    assert "Where the mass lies" in call("show", saved, "--by", "word").output
    wrong = call("show", saved, "--by", "chapter")
    assert wrong.exit_code == 2 and "units must be one of 'word'" in wrong.output


def test_families_and_version():
    assert call("families").stdout.split() == supported_families()
    assert call("--version").stdout.strip() == __version__


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from flashtrace_plugin.cli.app import app\n"
        "assert CliRunner().invoke(app, ['attribute', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_is_the_command_line():
    command = [sys.executable, "-m", "flashtrace_plugin", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 prompts were given"),
        (["--prompt", "x", "--messages-file", "{bad}"], "2 prompts were given"),
        (["--messages-file", "{bad}"], "is not JSON"),
        (["--messages-file", "{other}"], "holds no chat messages"),
        (["--prompt-file", "{latin}"], "is not UTF-8"),
        (["--prompt-file", "none.txt"], "cannot read none.txt"),
        ([*TEXTS, "--generation-file", "{bad}"], "both --generation and --generation-file"),
        ([*TEXTS, "--method", "magic"], "--method must be one of"),
        ([*TEXTS, "--method", "ifr", "--hops", "2"], "'ifr' has no option hops"),
        ([*TEXTS, "-o", "hops"], "not of the form NAME=VALUE"),
        (
            [*TEXTS, "--method", "flashtrace", "-o", "speed=1"],
            "'flashtrace' has no option speed; it takes hops, recursion",
        ),
        ([*TEXTS, "--method", "flashtrace", "--positions", "left"], "positions must be one of"),
        ([*TEXTS, "--dtype", "int3"], "--dtype must be one of"),
        ([*TEXTS, "--device", "abacus"], "available here: "),
        ([*TEXTS, "--target", "attic"], "occurs 0 times"),
        ([*TEXTS, "--target", "0:2"], "outside the generation"),
        ([*TEXTS, "--target", "5:5"], "is empty, reversed or negative"),
        (["--prompt", "", "--generation", "x"], "the prompt is empty"),
        (["--prompt", "x", "--generation", "<think>never"], "no </think>"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, folder, tmp_path):
    files = {"bad": "{", "other": '{"role": "user"}', "latin": b"\xff\xfe"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    given = [a[1:-1] if a[1:-1] in files and a[:1] == "{" else None for a in arguments]
    filled = [str(tmp_path / name) if name else a for name, a in zip(given, arguments, strict=True)]
    assert message in refused("attribute", "--model", folder, *filled)


def test_models_that_cannot_be_loaded(tmp_path):
    assert "no such folder" in refused("attribute", "--model", tmp_path / "none", *TEXTS)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "it is a file" in refused("attribute", "--model", tmp_path / "weights.bin", *TEXTS)
    assert "cannot load the model" in refused("attribute", "--model", tmp_path, *TEXTS)


def test_pickled_weights_are_read_only_when_asked_for(folder, tmp_path):
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "cannot load the model" in refused("attribute", "--model", tmp_path, *TEXTS)
    assert call("attribute", "--model", tmp_path, *TEXTS, "--allow-pickle").exit_code == 0


def test_files_that_are_no_attributions(tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    assert "not an attribution" in refused("show", tmp_path / "a.json")
    assert call("show", tmp_path / "none.json").exit_code == 2


def test_outputs_are_checked_before_the_work(tmp_path):
    assert "none does not exist" in refused("attribute", *TEXTS, "--html", tmp_path / "none" / "a.html")


def test_devices():
    assert checked_device("cpu") == "cpu" and checked_device("cpu:0") == "cpu:0"
    with pytest.raises(InputError, match="device 'abacus' is not available"):
        checked_device("abacus")


# What the model wrote ------------------------------------------------------------------------------------------------

WRITES = ["--prompt", PROMPT, "--max-new-tokens", 5]


def test_what_the_model_wrote_is_shown_and_kept_where_the_target_is_not_found(folder, loaded, tmp_path):
    kept = tmp_path / "kept.txt"
    result = call("attribute", "--model", folder, *WRITES, "--target", "banana", "--generation-out", kept)
    expected = write(*loaded, PROMPT, 5).generation
    assert result.exit_code == 2 and kept.read_text(encoding="utf-8") == expected
    assert expected.split()[0] in result.stdout and f"--generation-file {kept}" in result.stderr


def test_what_the_model_wrote_is_kept_without_being_asked_for(folder, loaded):
    result = call("attribute", "--model", folder, *WRITES, "--target", "banana")
    (path,) = re.findall(r"--generation-file (\S+)", result.stderr)
    assert Path(path).read_text(encoding="utf-8") == write(*loaded, PROMPT, 5).generation
    Path(path).unlink()


def test_remedies_name_flags(folder):
    cut = refused("attribute", "--model", folder, "--prompt", "x", "--generation", "<think>never")
    assert "raise --max-new-tokens, or pass --target and --reasoning" in cut and "=..." not in cut
    assert "'flashtrace-plugin tokens' lists" in refused("attribute", "--model", folder, *TEXTS, "--target", "attic")
    flags = {"--hops", "--max-cost"}
    assert (
        in_flags("use hops='auto', or max_cost=None, or rank=3", flags)
        == "use --hops auto, or --max-cost None, or rank=3"
    )


def test_a_foreign_text_for_the_bundled_model():
    message = refused("attribute", "--prompt", "What is the capital of France?")
    assert "does not know 'What', 'capital', 'of', 'France?'" in message and "? v12 think" in message
    with pytest.raises(InputError, match="Paris"):
        reasoner.check_words(reasoner.load()[1], "v12 Paris ; ? v12 think")


def test_json_on_stdout_is_alone_there(folder, loaded, tmp_path):
    result = call("attribute", "--model", folder, *WRITES, "--json", "-")
    assert Attribution.from_dict(json.loads(result.stdout)).method == "recommended"
    assert "Top tokens" in result.stderr and "The model wrote" in result.stderr
    assert "to go to stdout" in refused("attribute", *TEXTS, "--json", "-", "--html", "-")
    assert "stdin" in refused("attribute", "--prompt-file", "-", "--generation-file", "-")


def test_unwritable_files_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a.json", tmp_path / ("x" * 300)):
        assert "cannot write" in refused("attribute", *TEXTS, "--json", path)
    assert (tmp_path / "file").read_text() == "x"


def test_positions_are_listed(folder, loaded, tmp_path):
    saved = tmp_path / "a.json"
    assert call("attribute", "--model", folder, *TEXTS, "--json", saved).exit_code == 0
    listed = call("tokens", "--model", folder, *TEXTS).stdout
    assert listed == call("tokens", saved).stdout
    found = Attribution.load(saved)
    lines = [line.split() for line in listed.splitlines()]
    assert len(lines) == len(found.tokens) and [int(line[0]) for line in lines] == list(range(len(lines)))
    assert [int(line[0]) for line in lines if line[1] == "target"] == list(found.target)
    cut = call("tokens", "--model", folder, "--prompt", "x", "--generation", "<think>never")
    assert cut.exit_code == 0 and "no answer was found" in cut.stderr and "prompt" in cut.stdout


# Terminals -----------------------------------------------------------------------------------------------------------


def piped(*arguments, encoding, **environment):
    command = [sys.executable, "-m", "flashtrace_plugin", *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": encoding} | environment
    run = subprocess.run(command, check=False, capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.decode(encoding), run.stderr.decode(encoding)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.json"
    assert call("attribute", "--model", folder, *TEXTS, "--json", path).exit_code == 0
    return path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_and_width(saved, encoding):
    out, err = piped("show", saved, "--by", "word", encoding=encoding, COLUMNS="44")
    assert not err and max(map(len, out.splitlines())) <= 44
    assert {"ascii": "#", "cp1252": "#", "utf-8": "█"}[encoding] in out and "\\u" not in out


def test_control_characters_of_a_file_never_reach_the_terminal(saved, tmp_path):
    bad = "\x1b[2J\x9b\u202e"
    data = json.loads(saved.read_text(encoding="utf-8"))
    data |= {"method": bad, "tokens": [f"{bad}{token}" for token in data["tokens"]], "contents": []}
    data["settings"] |= {bad: bad, "model": bad}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    for arguments in (["show", path, "--by", "word"], ["tokens", path]):
        out = call(*arguments).output
        assert "⟨U+202E⟩" in out and not {"\x1b", "\x9b", "\u202e"} & set(out)
    data["format"] = bad
    path.write_text(json.dumps(data), encoding="utf-8")
    assert "\x1b" not in refused("show", path)


def test_texts_that_are_none(folder, tmp_path):
    half = tmp_path / "m.json"
    half.write_text('[{"role": "user", "content": "\\ud800"}]', encoding="utf-8")
    common = ["attribute", "--model", folder, "--generation", "x"]
    assert "half of a surrogate pair" in refused(*common, "--messages-file", half)
    half.write_text("[" + "7" * 5000 + "]", encoding="utf-8")
    assert "is not JSON" in refused(*common, "--messages-file", half)
    assert "is not UTF-8" in call(*common, "--prompt-file", "-", input=b"\xff").stderr
    assert call(*common, "--prompt", "\udcff").exit_code == 2


def test_progress_only_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.telling() as tell:
        tell("Loading")
    assert not stream.getvalue()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with progress.telling() as tell:
        count = progress.TokenCount(tell, 9)
        for _ in range(4):
            count.put(None)
        count.end()
    assert "The model writes: 3 of at most 9 tokens" in stream.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"), [("tok", "tokens"), ("attribute --method fl", "flashtrace"), ("show --by sen", "sentence")]
)
def test_shells_complete(words, expected):
    line = f"flashtrace-plugin {words}"
    asked = {
        "_FLASHTRACE_PLUGIN_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name="flashtrace-plugin", env=asked)
    assert result.stdout.split() == [expected]
