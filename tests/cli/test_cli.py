"""The console command: doctor tells what is there, quantize writes a checkpoint that loads."""

import subprocess
import sys

import pytest
import transformers
from typer.testing import CliRunner

import olive.doctor
from olive.cli import app
from olive.ops import gpu_backend

MODEL = "examples/tiny_llama"


@pytest.fixture
def model_path(request):
    return str(request.config.rootpath / MODEL)


def test_doctor_finds_the_kernels():
    result = CliRunner().invoke(app, ["doctor"])
    assert "olive-quant" in result.output
    assert "CPU kernels" in result.output


def test_doctor_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(olive.doctor, "installed_version", lambda name: "1.0" if name == "olive-ai" else None)
    monkeypatch.setattr("olive.ops.cpu_backend", lambda: "reference")
    problems = olive.doctor.examine().problems
    assert any("pip install ." in problem for problem in problems)
    assert any("olive-ai" in problem for problem in problems)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


@pytest.fixture
def one_gpu(monkeypatch):
    """As if there were an NVIDIA GPU; what its backends lack is up to the test."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("olive.ops.triton.missing", lambda device: "")
    gpu_backend.cache_clear()
    yield monkeypatch
    gpu_backend.cache_clear()


def test_doctor_tells_which_kernels_serve_a_gpu(one_gpu):
    one_gpu.setattr("olive.ops.cuda.missing", lambda device: "")
    found = olive.doctor.examine()
    assert found.facts["GPU 0"] == "NVIDIA H200, 9.0, cuda kernels"
    assert not [problem for problem in found.problems if "GPU" in problem]


def test_doctor_tells_why_a_gpu_has_no_cuda_kernels(one_gpu):
    one_gpu.setattr("olive.ops.cuda.missing", lambda device: "olive._cuda was not built")
    found = olive.doctor.examine()
    assert found.facts["GPU 0"] == "NVIDIA H200, 9.0, triton kernels"
    assert "GPU 0 runs without the CUDA kernels: olive._cuda was not built" in found.problems


def test_doctor_reports_a_backend_that_cannot_be_had(one_gpu):
    one_gpu.setattr("olive.ops.cuda.missing", lambda device: "olive._cuda was not built")
    one_gpu.setenv("OLIVE_GPU_BACKEND", "cuda")
    problems = olive.doctor.examine().problems
    assert any("expected a backend that can serve cuda:0, got 'cuda'" in problem for problem in problems)


def test_quantize_writes_a_checkpoint_that_loads(model_path, tmp_path):
    out = tmp_path / "quantized"
    result = CliRunner().invoke(app, ["quantize", model_path, str(out), "--group-size", "64"])
    assert result.exit_code == 0, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.quant_method == "olive"
    assert model.model.layers[0].mlp.down_proj.group_size == 64
    assert transformers.AutoTokenizer.from_pretrained(out).vocab_size == 1024


def test_quantize_refuses_an_existing_folder(model_path, tmp_path):
    result = CliRunner().invoke(app, ["quantize", model_path, str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "does not exist yet" in result.output
    assert not list(tmp_path.iterdir())


def test_python_m_olive_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "olive", "--help"], capture_output=True, text=True, check=True
    )
    assert "doctor" in run.stdout


def test_quantize_with_activations(model_path, tmp_path):
    out = tmp_path / "quantized"
    options = ["--bits", "8", "--activations", "int8", "--activation-group-size", "64"]
    result = CliRunner().invoke(app, ["quantize", model_path, str(out), *options])
    assert result.exit_code == 0, result.output
    assert "int8 64" in result.output
    layer = transformers.AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.down_proj
    assert (layer.bits, layer.activation_format.name, layer.activation_format.group_size) == (8, "int8", 64)


def test_quantize_with_gptq_and_rotation(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr("olive.ptq.gptq.MULTIPLES", (1.0,))
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    out = tmp_path / "quantized"
    text = f"{model_path}/heldout.txt"
    options = ["--method", "gptq", "--codebook", "nf4", "--rotate", "--calibration", text]
    result = CliRunner().invoke(
        app, ["quantize", model_path, str(out), *options, "--window", "64", "--windows", "16"]
    )
    assert result.exit_code == 0, result.output
    quant = transformers.AutoModelForCausalLM.from_pretrained(out).config.quantization_config.quant
    assert (quant.method, quant.codebook, quant.rotate) == ("gptq", "nf4", True)


def test_quantize_with_online_rotation(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    out = tmp_path / "quantized"
    options = ["--codebook", "int4", "--activations", "ovp4", "--rotate", "--rotate-online"]
    result = CliRunner().invoke(app, ["quantize", model_path, str(out), *options])
    assert result.exit_code == 0, result.output
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.quantization_config.quant.rotate_online
    assert loaded.model.layers[0].mlp.down_proj.input_rotation == 256


def test_quantize_on_what_the_model_writes(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.gptq.MULTIPLES", (1.0,))
    out = tmp_path / "quantized"
    options = ["--method", "gptq", "--codebook", "int4", "--synthetic", "--window", "64", "--windows", "8"]
    result = CliRunner().invoke(app, ["quantize", model_path, str(out), *options])
    assert result.exit_code == 0, result.output
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.quantization_config.quant.method == "gptq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rotate-online"], "rotate_online: expected False without rotate=True, got True"),
        (["--bits", "8", "--codebook", "nf4"], "codebook: expected 'ovp8' with bits=8"),
        (
            ["--activations", "int8", "--activation-group-size", "0"],
            "expected a text file for static activation scales, got none",
        ),
        (["--method", "gptq"], "expected a text file for method 'gptq', got none"),
        (["--calibration", "no_such_file"], "no_such_file"),
        (["--window", "64"], "expected --calibration or --synthetic as well"),
        (["--calibration", __file__, "--synthetic"], "expected no --calibration beside it, got both"),
        (["--activation-codebook", "nf4"], "activation_codebook: expected 'int4' unless"),
    ],
)
def test_quantize_refuses_what_does_not_go_together(model_path, tmp_path, options, message):
    arguments = ["quantize", model_path, str(tmp_path / "new"), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output
