"""The command line: what it prints where, its exit codes, and that help needs no JAX."""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time
import types

import pytest
import typer
from cli_models import EXPERTS, LAYERS, damage, write_model
from typer.testing import CliRunner

import moejax
from moejax import errors
from moejax.cli import conversation, exits
from moejax.cli import main as cli
from moejax.cli.actions import read_prompts
from moejax.live import FASTEST, SLOWEST
from moejax.terminal import Terminal

COMMANDS = ["generate", "chat", "inspect", "convert", "bench", "tune", "policies"]
COMMANDS += ["build-native", "doctor", "plan", "simulate", "eval", "report", "trace"]
SLOTS = 6


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("cli") / "model"))


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin)


def ok(*arguments, stdin=None):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C works, also where the tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-m", "moejax", *map(str, arguments)], **options)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_neither_jax_nor_transformers(command):
    program = (
        "import sys\nfrom moejax.cli.main import main\n"
        f"sys.argv = {['moejax', *([command] if command else []), '--help']}\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'jax', 'jaxlib', 'transformers', 'torch', 'numpy', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: moejax" in done.stdout


def test_version():
    assert ok("--version").stdout.strip().startswith("moejax ")


def test_every_command_is_in_these_tests():
    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert {name.replace("_", "-") for name in known} == set(COMMANDS)


def test_every_error_has_an_exit_code_of_its_own_or_its_base():
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    for kind in classes:
        if kind is not errors.MoejaxError:
            assert exits.exit_code(kind("x")) in range(2, 10), kind
    listed = {str(code) for code in [*exits.EXIT_CODES.values(), exits.INTERNAL, exits.INTERRUPTED]}
    assert all(f" {code} " in cli.EPILOG for code in listed)


def test_generate_streams_text_and_tells_the_cost_on_stderr(model):
    result = ok("generate", "the cat", "--model", model, "--slots", SLOTS, "-n", 5)
    [completion] = moejax.load(model, slots=SLOTS).generate("the cat", 5)
    assert result.stdout == completion.text + "\n"
    for said in ("5 out", "time to first token", f"{SLOTS} of {LAYERS * EXPERTS}"):
        assert said in result.stderr
    assert "bit-exact" in result.stderr


def test_quiet_says_nothing_on_stderr(model):
    assert ok("generate", "the cat", "-m", model, "-n", 2, "--quiet").stderr == ""


def test_generate_json_is_one_document_with_tokens_stats_and_environment(model):
    result = ok(
        *("generate", "the cat", "on", "-m", model, "--slots", SLOTS, "-n", 4, "--json"),
        *("--logprobs", 2, "--temperature", 0.8, "--seed", 3),
    )
    document = json.loads(result.stdout)
    first, second = document["completions"]
    assert (first["prompt"], second["prompt"]) == ("the cat", "on")
    assert len(first["tokens"]) == 4 and len(first["tokens"][0]["top_logprobs"]) == 2
    stats = document["stats"]
    assert stats["slots"] == SLOTS and stats["bytes_moved"] > 0 and stats["label"] == "bit-exact"
    assert document["environment"]["versions"]["jax"]


def test_the_seed_decides_the_text(model):
    def text(seed):
        options = ("-m", model, "-n", 12, "--temperature", 1.5, "-q", "--seed", seed)
        return ok("generate", "the", *options).stdout

    assert text(1) == text(1) != text(2)


def test_prompts_come_from_a_file_or_stdin(model, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("the cat\n")
    given = ok("generate", "the cat", "-m", model, "-n", 4, "-q").stdout
    assert ok("generate", "--file", file, "-m", model, "-n", 4, "-q").stdout == given
    assert ok("generate", "-m", model, "-n", 4, "-q", stdin="the cat\n").stdout == given


def test_without_a_prompt_there_is_one_line_that_says_where_it_may_come_from(model, monkeypatch):
    shown = " ".join(ok("generate", "--help").stdout.split())
    assert "without either, what is piped to stdin" in shown
    for stdin in ("", "\n"):
        result = run("generate", "-m", model, stdin=stdin)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert "no prompt: give one as argument, with --file, or pipe it" in result.stderr
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))  # no `read`
    with pytest.raises(errors.InputError, match="no prompt"):
        read_prompts([], [])


def test_what_is_not_utf_8_is_named(model, tmp_path):
    file = tmp_path / "latin"
    file.write_bytes("café".encode("latin-1"))
    for arguments, stdin, name in (
        (("generate", "--file", file), None, str(file)),
        (("generate",), file.read_bytes(), "standard input"),
        (("chat", "--no-warm-up", "-q"), file.read_bytes(), "standard input"),
        (("generate", "caf\udce9"), None, "a prompt"),
    ):
        result = run(*arguments, "-m", model, stdin=stdin)
        assert result.exit_code == 2
        assert result.stderr == f"moejax: {name} is not UTF-8 text\n"


def test_json_that_is_not_utf_8_is_named(model, tmp_path):
    other = write_model(tmp_path / "other")
    (other / "config.json").write_bytes(b'{"caf\xe9": 1}')
    options = ("-m", model, "--slots", SLOTS, "--no-warm-up", "--residency-file")
    for arguments, name in (
        (("inspect", other), other / "config.json"),
        (("generate", "a", *options, other / "config.json"), other / "config.json"),
    ):
        result = run(*arguments)
        assert result.exit_code == 3 and result.stderr.count("\n") == 1
        assert str(name) in result.stderr and "it is not UTF-8 text" in result.stderr
        assert "codec" not in result.stderr


def test_slots_may_be_a_share_of_all_experts(model):
    options = ("-m", model, "-n", 2, "-q", "--json", "--no-warm-up")
    document = json.loads(ok("generate", "the cat", *options, "--slots", "45%").stdout)
    assert document["stats"]["slots"] == LAYERS * EXPERTS * 45 // 100
    too_few = run("generate", "the cat", *options, "--slots", "1%")
    assert too_few.exit_code == 4 and "slots cannot hold" in too_few.stderr


def test_every_command_with_slots_takes_a_share():
    group = typer.main.get_command(cli.app)
    commands = {**group.commands, **group.commands["trace"].commands}
    taking = {n: o for n, c in commands.items() for o in c.params if o.name == "slots"}
    assert set(taking) == {"generate", "chat", "bench", "tune", "eval", "simulate", "record"}
    assert {option.metavar for option in taking.values()} == {"N|P%"}


def test_a_residency_file_that_is_new_is_said_to_be(model, tmp_path):
    file = tmp_path / "experts.json"
    options = ("-m", model, "-n", 2, "--slots", SLOTS, "--residency-file", file)
    said = f"{file} does not exist yet: a cold start; the file is written at the end\n"
    assert said in ok("generate", "the cat", *options).stderr
    assert file.exists()
    assert "cold start" not in ok("generate", "the cat", *options).stderr
    file.unlink()
    assert said in ok("chat", *options, stdin="the cat\n").stderr
    assert file.exists()


def test_a_batch_prints_each_answer_in_order(model):
    both = ok("generate", "the cat", "on", "-m", model, "-n", 3, "-q").stdout
    one, two = (ok("generate", p, "-m", model, "-n", 3, "-q").stdout for p in ("the cat", "on"))
    assert both == f"[1] {one}[2] {two}"


def test_stop_ends_the_text(model):
    text = ok("generate", "the cat", "-m", model, "-n", 8, "-q").stdout.strip("\n")
    cut = text[len(text) // 2]
    options = ("-m", model, "-n", 8, "-q", "--stop", cut)
    assert ok("generate", "the cat", *options).stdout.strip("\n") == text[: text.index(cut)]


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ("generate", ""), "prompt is empty"),
        (2, ("generate", "a", "--policy", "nope"), "unknown policy"),
        (2, ("generate", "a", "--dtype", "float8"), "dtype"),
        (2, ("generate", "a", "--context", 100000), "context"),
        (2, ("generate", "a", "--temperature", -1), "temperature"),
        (2, ("generate", "a", "--device-memory", "lots"), "not a size"),
        (2, ("generate", "a", "--slots", "lots"), "a share of all experts, such as 40%"),
        (2, ("generate", "a", "--slots", "140%"), "a share of all experts, such as 40%"),
        (2, ("generate", "a", "--drift-budget", -1), "not -1 nats every 16 steps"),
        (2, ("generate", "a", "--drift-budget", 1), "steers the alpha of a lossy policy"),
        (2, ("chat", "--drift-every", 4), "give --drift-budget too"),
        (2, ("generate", "a", "--file", "/does/not/exist"), "there is no file /does/not/exist\n"),
        (3, ("generate", "a", "--model", "/does/not/exist"), "no directory"),
        (4, ("generate", "a", "--slots", 1), "slots cannot hold"),
        (4, ("generate", "a", "--device-memory", "10kB"), "too little"),
        (2, ("generate", "a", "--device-memory", "1GB", "--slots", 4), "only one of --slots"),
    ],
)
def test_errors_are_one_line_and_a_code(model, code, arguments, said):
    named = () if "--model" in arguments else ("--model", model)
    result = run(*arguments, *named)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("moejax: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_a_download_that_fails_has_its_own_code(monkeypatch):
    result = run("inspect", "nobody/not-in-any-cache")
    assert result.exit_code == 5 and result.stderr.count("\n") == 1


def test_errors_of_several_lines_become_one():
    error = errors.CheckpointError("it does not fit:\n  missing: a\n  extra: b\n")
    assert exits.one_line(error) == "it does not fit: missing: a; extra: b"


def test_a_bug_is_reported_as_one(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("what is this")

    monkeypatch.setattr("moejax.cli.actions.generate", broken)
    result = run("generate", "a", "-m", model, "-q")
    assert result.exit_code == 70
    assert "RuntimeError: what is this" in result.stderr and result.stderr.count("\n") == 1
    monkeypatch.setenv("MOEJAX_DEBUG", "1")
    assert isinstance(run("generate", "a", "-m", model, "-q").exception, RuntimeError)


def test_running_out_of_memory_is_a_budget_error(model, monkeypatch):
    def starved(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr("moejax.cli.actions.generate", starved)
    result = run("generate", "a", "-m", model, "-q")
    assert result.exit_code == 4 and "out of memory" in result.stderr


def test_a_broken_pipe_is_silent(model):
    process = start("generate", "the cat", "-m", model, "-n", 150, "-q")
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == exits.BROKEN_PIPE


def test_ctrl_c_leaves_cleanly(model, tmp_path):
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    process = start("generate", "-m", model, "--file", fifo)
    with open(fifo, "w"):  # returns when the program has begun to read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_chat_answers_lines_of_stdin(model):
    options = ("-m", model, "-n", 6, "--slots", SLOTS)
    result = ok("chat", *options, stdin="the cat\n\n/stats\nthe rat\n")
    document = json.loads(ok("chat", *options, "--json", stdin="the cat\nthe rat\n").stdout)
    roles = [m["role"] for m in document["messages"]]
    answers = [m["content"] for m in document["messages"] if m["role"] == "assistant"]
    assert roles == ["user", "assistant"] * 2
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    assert result.stderr.count("expert hit rate") == 1


def test_chat_reset_forgets_and_exit_leaves(model):
    options = ("-m", model, "-n", 2, "--json", "-q", "--system", "on the mat")
    turns = "the cat\n/reset\nthe rat\n/exit\nthat\n"
    messages = json.loads(ok("chat", *options, stdin=turns).stdout)["messages"]
    assert [m["content"] for m in messages[:2]] == ["on the mat", "the rat"]
    assert len(messages) == 3


@pytest.mark.parametrize("leave", ["/exit", "/quit"])
def test_chat_says_which_commands_there_are(model, leave):
    turns = f"/reste\n/help\n{leave}\nthat\n"
    result = ok("chat", "-m", model, "-n", 2, "--no-warm-up", stdin=turns)
    unknown, help_ = [line for line in result.stderr.splitlines() if "/exit or /quit" in line]
    assert unknown == f"there is no /reste: {help_}" and result.stdout == ""
    assert all(command in help_ for command in ("/reset", "/stats", "/help"))


def test_chat_steers_its_drift_in_every_answer(model):
    options = ("-m", model, "-n", 8, "--slots", SLOTS, "-q", "--json", "--no-warm-up")
    steered = ("--policy", "smoe-fetch:alpha=0.5", "--drift-budget", 1e-6, "--drift-every", 2)
    document = json.loads(ok("chat", *options, *steered, stdin="the cat\nthe rat\n").stdout)
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"] * 2
    drift = document["stats"]["drift"]
    assert drift["probes"] == 4 == len(drift["alphas"])
    assert 0.5 * SLOWEST <= drift["alphas"][0] <= 0.5 * FASTEST  # of the second answer


def test_a_turn_that_does_not_fit_fails_without_a_terminal(model):
    result = run("chat", "-m", model, "-q", "--context", 16, stdin="the cat " * 40)
    assert result.exit_code == 2 and "context" in result.stderr


class Screen:
    """A pseudo-terminal with a program on it."""

    def __init__(self, *arguments):
        self.master, child = pty.openpty()
        self.process = start(*arguments, stdin=child, stdout=child, stderr=child, text=False)
        os.close(child)
        self.shown = b""

    @property
    def text(self):
        return self.shown.decode(errors="replace")

    def wait_for(self, wanted, count=1):
        end = time.time() + 60
        while self.text.count(wanted) < count:
            assert self._read() and time.time() < end, f"no {wanted!r} in {self.text!r}"

    def type(self, keys):
        os.write(self.master, keys.encode())

    def finish(self):
        while self._read():
            pass
        return self.process.wait(60)

    def listen(self, seconds):
        """Take in what comes in this time."""
        end = time.time() + seconds
        while time.time() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                self._read()

    def _read(self):
        arrived = select.select([self.master], [], [], 60)[0]
        assert arrived, f"nothing more after {self.text!r}"
        try:
            more = os.read(self.master, 4096)
        except OSError:  # Linux says EIO when the program has closed the terminal
            more = b""
        self.shown += more
        return more


@pytest.fixture
def screen(model):
    made = Screen("chat", "-m", model, "-n", 20, "--slots", SLOTS)
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.master)


def test_chat_at_a_terminal(screen):
    screen.wait_for("> ")
    screen.type("the cat\nthe rat\n")  # pasted: one turn of two lines
    screen.wait_for("> ", 2)
    screen.type('"""\nthe mat\n\nthe cat\n"""\n')
    screen.wait_for("… ", 4)
    screen.wait_for("> ", 3)
    screen.type("/stats\n")
    screen.wait_for("expert hit rate")
    screen.wait_for("> ", 4)
    while "Ctrl-D, /exit or /quit leaves" not in screen.text:
        # Python misses a signal that arrives between the prompt and the wait for a key.
        screen.process.send_signal(signal.SIGINT)
        screen.listen(2)
    screen.type("\x04")
    assert screen.finish() == 0, screen.text


def test_a_typed_line_that_is_not_utf_8_is_left_out(monkeypatch, capsys):
    def read_turn(lines=iter([b"one", b"caf\xe9", b"two"])):  # noqa: B008 - of one test
        try:
            return next(lines).decode()
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(conversation, "_read_turn", read_turn)
    assert list(conversation._turns(Terminal(), interactive=True)) == ["one", "two"]
    assert "not UTF-8 text" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(model):
    from moejax.cli.conversation import Stopper, _answer
    from moejax.session import Session

    runtime = moejax.load(model, slots=SLOTS)
    session, stopper = Session(runtime), Stopper()

    def interrupted(pieces):
        for i, piece in enumerate(pieces):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    with stopper.watching():
        pieces = interrupted(session.send("the cat", 50))
        _answer(session, "the cat", pieces, stopper, silent=True)
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    said = session.messages[-1]["content"]
    whole = moejax.load(model, slots=SLOTS)
    first = [p.token.id for p in Session(whole).send("the cat", 3)]
    assert said == whole.tokenizer.decode(first)
    assert list(session.send("the rat", 4))  # the state has survived
    assert session.reused_tokens > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once():
    from moejax.cli.conversation import Stopper

    stopper = Stopper()
    with pytest.raises(KeyboardInterrupt), stopper.watching():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_inspect_counts_from_headers_alone(model, monkeypatch):
    document = json.loads(ok("inspect", model, "--json").stdout)
    shape = document["config"]
    assert (shape["layers"], shape["experts_per_layer"]) == (LAYERS, EXPERTS)
    file = pathlib.Path(model) / "model.safetensors"
    assert sum(document["stored"].values()) == 2 * document["parameters"]
    assert document["parameters"] * 2 < file.stat().st_size
    unused = LAYERS * (EXPERTS - shape["experts_per_token"]) * 3 * 32 * 16
    assert document["active_parameters"] == document["parameters"] - unused
    runtime = moejax.load(model)
    kv = runtime.init_state(context=1024).kv
    assert document["kv_bytes_per_1k_tokens"] == kv.keys.nbytes + kv.values.nbytes
    assert document["all_experts_bytes"] == runtime.store.records.nbytes
    assert ok("inspect", model).stdout.count("bfloat16") == 1


def test_loading_gives_the_slots_that_inspect_promises():
    document = json.loads(ok("inspect", "tiny", "--context", 128, "--json").stdout)
    for fit in document["fits"][:2]:
        runtime = moejax.load("tiny", device_memory=fit["budget"], context=128)
        assert runtime.slots == fit["slots"]


def test_a_run_says_what_became_of_its_slots():
    options = ("-m", "tiny", "--context", 128, "-n", 4)
    shown = ok("generate", "The sea", *options, "--slots", 500).stderr
    assert "--slots 500: there are 192 experts" in shown and "expert bytes" not in shown
    assert "all 192 fit: weights are read in place" in " ".join(shown.split())
    shown = ok("generate", "The sea", *options, "--slots", 76, "--policy", "host").stderr
    assert "0 of 76 slots filled" in shown and "--residency-file" in shown
    shown = ok("generate", "The sea", *options, "--slots", 76, "--policy", "auto").stderr
    assert "76 of 192 (40%)" in shown and "predicted" not in shown


def test_no_limit_is_shown_and_taken_as_all():
    shown = " ".join(ok("policies").stdout.split())
    assert "limit=all, cutoff=all" in shown and str(2**30) not in shown
    from moejax.policies.policy import policy

    given, own = (policy(f"sp-moe{numbers}") for numbers in (":limit=all,cutoff=all", ""))
    assert given.foresight.limit == own.foresight.limit == 2**30
    with pytest.raises(errors.PolicyError, match="gamma of policy 'sp-moe' must be"):
        policy("sp-moe:gamma=all")


def test_inspect_refuses_what_does_not_fit(model, tmp_path):
    other = write_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_experts": EXPERTS + 1}))
    result = run("inspect", other)
    assert result.exit_code == 3 and result.stderr.count("\n") == 1


def test_verify_finds_nan(tmp_path):
    broken = write_model(tmp_path / "broken")
    damage(broken, "model.layers.1.mlp.experts.3.up_proj.weight")
    assert ok("inspect", broken).exit_code == 0
    result = run("inspect", broken, "--verify")
    assert result.exit_code == 6 and "experts.3.up_proj" in result.stderr


@pytest.mark.parametrize("option", [(), ("--orbax",)])
def test_a_converted_model_is_the_same_model(model, tmp_path, option):
    target = tmp_path / "converted"
    document = json.loads(ok("convert", model, target, "--json", *option).stdout)
    assert document["bytes"] == sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    assert "verified" in ok("inspect", target, "--verify").stdout
    options = ("--slots", SLOTS, "-n", 6, "-q")
    texts = [ok("generate", "the cat", "-m", m, *options).stdout for m in (model, target)]
    assert texts[0] == texts[1]
    assert json.loads(ok("inspect", target, "--json").stdout)["dtype"] == "bfloat16"

    again = run("convert", model, target, *option)
    assert again.exit_code == 3 and "exists" in again.stderr
    ok("convert", model, target, "--force", *option)
    assert run("convert", target, tmp_path / "twice").exit_code == 3
    assert run("generate", "a", "-m", target, "--dtype", "float32").exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted"]


def test_convert_replaces_nothing_that_is_not_its_own(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    for option in ((), ("--orbax",)):
        assert run("convert", model, tmp_path / "mine", "--force", *option).exit_code == 3
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    assert run("convert", model, model, "--force", "--orbax").exit_code == 3
    assert run("convert", model, tmp_path / "no" / "where", "--orbax").exit_code == 3


def test_a_damaged_bank_is_found_by_verify(model, tmp_path):
    target = tmp_path / "converted"
    ok("convert", model, target)
    bank = target / "experts.bank"
    data = bytearray(bank.read_bytes())
    data[-4096 * 5] ^= 1
    bank.write_bytes(data)
    ok("inspect", target)
    result = run("inspect", target, "--verify")
    assert result.exit_code == 3 and "damaged" in result.stderr


def test_after_the_warm_up_nothing_is_compiled(model):
    from moejax.generate import generate_step
    from moejax.session import Session

    sampling = {"temperature": 0.7, "repetition_penalty": 1.1}
    runtime = moejax.load(model, slots=SLOTS)
    runtime.warm_up(sampling=sampling)
    compiled = generate_step._cache_size()
    runtime.generate([[5, 6, 7] * 30], 3, sampling)  # more than one chunk of prefill
    session = Session(runtime)
    for turn in ("the cat", "the rat"):
        assert list(session.send(turn, 3, sampling))
    assert session.reused_tokens > 0
    assert generate_step._cache_size() == compiled


def test_the_warm_up_compiles_the_decode_step_even_if_the_first_token_is_a_stop(model, monkeypatch):
    from moejax.generate import generate_step

    runtime = moejax.load(model, slots=SLOTS, context=64)
    everything = frozenset(range(runtime.config.vocab_size))
    monkeypatch.setattr(type(runtime), "stop_ids", everything)
    before = generate_step._cache_size()
    runtime.warm_up(logprobs=1)
    assert generate_step._cache_size() == before + 2  # prefill and decode


def test_budgets_run_from_the_first_that_runs_to_the_first_that_holds_all():
    from moejax.describe import MOST_BUDGETS, fits

    gib = 1 << 30
    shown = fits(fixed=3 * gib, record=9 << 20, least=8, experts=48 * 128)
    assert [f.budget // gib for f in shown] == [4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert shown[0].slots == 1024 // 9 and shown[-1].slots == 48 * 128
    assert [f.share for f in shown] == [f.slots / (48 * 128) for f in shown]
    [only] = fits(fixed=gib, record=1 << 10, least=2, experts=4)
    assert only.share == 1.0
    wide = fits(fixed=1 << 20, record=1 << 20, least=1, experts=1 << 20)
    assert len(wide) <= MOST_BUDGETS and wide[-1].share == 1.0
    assert fits(fixed=gib, record=0, least=0, experts=0) == ()
