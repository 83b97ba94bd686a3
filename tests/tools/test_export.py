"""Weights in and out: every layout there and back, hostile files, the cache, torch.hub; and the real
packages, where they are installed."""

import functools
import http.server
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_model import RELEASED

from config import UserError
from features import init_from_weights, load_backbone, read_weights
from model import DINOv2, VisionTransformer
from tools import export, weights

ROOT = Path(__file__).parents[2]
REGISTERS = dict(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
KINDS = {"mlp": {}, "mlp, registers": REGISTERS, "swiglu": dict(ffn_layer="swiglu"),
         "swiglu, registers": dict(ffn_layer="swiglu", **REGISTERS),
         "two heads": dict(num_heads=2, **REGISTERS),
         "no LayerScale, patches of 16": dict(layerscale=0, patch_size=16, img_size=48)}  # fmt: skip
kinds = pytest.mark.parametrize("kw", KINDS.values(), ids=KINDS)


def tiny(**kw):
    """A backbone in which every parameter matters."""
    args = dict(embed_dim=96, depth=3, num_heads=3, patch_size=4, img_size=24, layerscale=1.0)
    m, rng = VisionTransformer(**{**args, **kw}), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in m.parameters():
            x += 0.1 * torch.randn(x.shape, generator=rng)
    return m.eval().requires_grad_(False)


def same_features(a, b, sides=((6, 6), (5, 3))):
    for h, w in sides:
        x = torch.randn(2, 3, h * a.patch_size, w * a.patch_size)
        for ours, theirs in zip(a(x), b(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def same_tensors(a, b, but=()):
    assert a.keys() == b.keys()
    assert [k for k in a if k not in but and not torch.equal(a[k], b[k])] == []


def refused(words, path):
    with pytest.raises(UserError, match=words) as e:
        load_backbone(path)
    assert "\n" not in str(e.value)


# ---- there and back --------------------------------------------------------------------------------------


@kinds
def test_hugging_face_and_back(kw, tmp_path):
    m = tiny(**kw)
    export.write_hf(m, tmp_path / "out")
    back = load_backbone(tmp_path / "out")
    same_tensors(weights.rename(m.state_dict(), "hf"),
                 {k: v for k, v in weights.rename(back.state_dict(), "hf").items()
                  if m.arch["layerscale"] or "layer_scale" not in k})  # fmt: skip
    same_features(m, back)
    assert back.arch == {**m.arch, "layerscale": m.arch["layerscale"] or 1.0}
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["num_attention_heads"] == m.arch["num_heads"]


@kinds
def test_timm_and_back(kw, tmp_path):
    m, file = tiny(**kw), tmp_path / "w.safetensors"
    export.write_timm(m, file)
    back = load_backbone(file)
    folded = ("cls_token", "pos_embed") if m.num_register_tokens else ()
    same_tensors(m.state_dict(), back.state_dict(), but=("mask_token", *folded))
    assert torch.equal(m.pos_embed[:, 1:], back.pos_embed[:, 1:])
    same_features(m, back)
    assert back.arch == m.arch


@kinds
def test_meta_and_back(kw, tmp_path):
    m, file = tiny(**kw), tmp_path / "w.pth"
    if m.arch["num_heads"] == 2:  # nothing in the file could say so
        with pytest.raises(UserError, match="2 heads"):
            export.write_meta(m, file)
        return
    export.write_meta(m, file)
    back = load_backbone(file)
    same_tensors(m.state_dict(), back.state_dict())
    same_features(m, back)


def test_three_times_round_the_world(tmp_path):
    """Meta's -> Hugging Face's -> Meta's: the same bits."""
    m = tiny(**REGISTERS)
    torch.save(m.state_dict(), tmp_path / "a.pth")
    export.write_hf(load_backbone(tmp_path / "a.pth"), tmp_path / "hf")
    export.write_meta(load_backbone(tmp_path / "hf"), tmp_path / "b.pth")
    same_tensors(*(torch.load(tmp_path / f, weights_only=True) for f in ("a.pth", "b.pth")))


@pytest.mark.parametrize("to, out", [("hf", "hf"), ("timm", "w.safetensors"), ("meta", "w.pth")])
def test_the_command_exports_a_run(to, out, tmp_path, monkeypatch, capsys):
    m = tiny(**REGISTERS)
    (tmp_path / "run").mkdir()
    tensors = {f"backbone.{k}": v for k, v in m.state_dict().items()}
    torch.save({"teacher": tensors, "arch": m.arch}, tmp_path / "run" / "teacher.pth")
    words = ["export.py", str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / out)]
    monkeypatch.setattr(sys, "argv", words)
    export.main()
    said = capsys.readouterr().out
    assert float(re.search(r"read again: (\S+)", said)[1]) <= 1e-5 and "positions are interpolated" in said
    assert not list(tmp_path.rglob("*.partial"))
    same_features(m, load_backbone(tmp_path / out))
    monkeypatch.setattr(sys, "argv", [*words[:-1], str(tmp_path / "w.zip")])
    (tmp_path / "w.zip").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written|give --to"):
        export.main()


def test_a_run_starts_from_any_layout(tmp_path):
    import config

    cfg = config.load(model="debug")
    source, student = DINOv2(cfg).backbone, DINOv2(cfg)
    export.write_hf(source, tmp_path / "hf")
    assert "heads drawn anew" in init_from_weights(student, tmp_path / "hf")[0]
    same_tensors(source.state_dict(), student.backbone.state_dict())


# ---- layouts that are recognised -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_released_names_must_be_true(name):
    """All eight layouts pass under their own name, and under no other, whoever gave it."""
    D, R = RELEASED[name]["keys"]["cls_token"][2], 4 * ("reg4" in name)
    tensors = {"cls_token": torch.empty(1, 1, D), **({"register_tokens": 0} if R else {})}
    size, reg = {v: k for k, v in weights.WIDTHS.items()}[D], "_reg4" if R else ""
    own = {f"{name}_pretrain.pth", f"vit_{size}_patch14{reg}_dinov2.lvd142m.safetensors",
           f"dinov2{'-with-registers' if R else ''}-{size}/model.safetensors"}  # fmt: skip
    for path in own:
        weights.check_name(tensors, Path(path))
    others = {f"{other}_pretrain.pth" for other in RELEASED} - own
    others |= {
        f"vit_{size}_patch14{'' if R else '_reg4'}_dinov2.pth",
        f"dinov2-{'small' if D > 400 else 'base'}",
    }
    for path in others:
        with pytest.raises(UserError, match=rf"called after a ViT-\w+ .* holds a ViT-{size} "):
            weights.check_name(tensors, Path(path))
    assert weights.released_name(name) == weights.released_name(f"{name}_pretrain.pth") == name


def test_a_file_called_b_that_holds_s(tmp_path):
    file = tmp_path / "dinov2_vitb14_pretrain.pth"
    torch.save(tiny(embed_dim=384, num_heads=6, depth=1).state_dict(), file)
    refused("dinov2_vitb14_pretrain.pth is called after a ViT-base .* but holds a ViT-small", file)


@pytest.mark.parametrize("where", ["teacher", "model"])
def test_chunked_checkpoints_of_the_authors(where, tmp_path):
    """FSDP's words in the names, blocks in chunks, heads beside, and with "model" the student too."""
    m = tiny(depth=5, **REGISTERS)
    prefix = {"teacher": "module.", "model": "teacher."}[where]
    chunked = {}
    for k, v in m.state_dict().items():
        k = re.sub(r"blocks\.(\d+)\.", lambda n: f"blocks.{int(n[1]) // 2}._fsdp_wrapped_module.{n[1]}.", k)
        chunked[f"{prefix}backbone._fsdp_wrapped_module.{k}"] = v
        if where == "model":
            chunked[f"student.backbone._fsdp_wrapped_module.{k}"] = torch.zeros_like(v)
    chunked[f"{prefix}dino_head.last_layer.weight_g"] = torch.ones(8, 1)
    content = {where: chunked, "iteration": 7, **({"optimizer": {"state": {}}} if where == "model" else {})}
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    back = load_backbone(tmp_path / "teacher_checkpoint.pth")
    same_tensors(m.state_dict(), back.state_dict())
    same_features(m, back)
    assert list(read_weights(tmp_path / "teacher_checkpoint.pth")[1]) == ["dino_head.last_layer.weight_g"]


def test_chunks_that_count_anew_are_refused(tmp_path):
    tensors = tiny(depth=2).state_dict()
    tensors = {re.sub(r"blocks\.(\d)\.", r"blocks.\1.0.", k): v for k, v in tensors.items()}
    torch.save({"teacher": tensors}, tmp_path / "w.pth")
    refused("anew in every chunk", tmp_path / "w.pth")


def test_strict_in_every_layout(tmp_path):
    m = tiny(**REGISTERS)
    for layout in ("hf", "timm"):
        tensors = weights.rename(m.state_dict(), layout)
        last = list(tensors)[-1]
        key = next(k for k in tensors if "key.weight" in k or "qkv.weight" in k)
        for broken in ({k: v for k, v in tensors.items() if k != key}, {**tensors, "surplus": torch.ones(2)},
                       {**tensors, last: torch.ones(7)}, {**tensors, key: torch.tensor(1.0)},
                       {**tensors, "mask_token" if layout == "hf" else "register_tokens": torch.ones(1)},
                       {k: torch.tensor(1.0) for k in tensors}):  # fmt: skip
            export.write_safetensors(tmp_path / "w.safetensors", broken, {})
            refused(r"w.safetensors (is not the ViT of width 96|holds tensors)", tmp_path / "w.safetensors")
    torch.save({3: torch.ones(1)}, tmp_path / "w.pth")
    refused("no weights file", tmp_path / "w.pth")


def test_a_config_that_contradicts(tmp_path):
    export.write_hf(tiny(), tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    export.write_safetensors(tmp_path / "model.safetensors", weights.rename(tiny().state_dict(), "hf"), {})
    bad = {"hidden_act relu": {**good, "hidden_act": "relu"}, "hidden_size 768": {**good, "hidden_size": 768},
           "num_heads is 5": {**good, "num_attention_heads": 5}, "no config": [1],
           "num_heads is '3'": {**good, "num_attention_heads": "3"}}  # fmt: skip
    for words, about in bad.items():
        (tmp_path / "config.json").write_text(json.dumps(about))
        refused(words, tmp_path)


# ---- safetensors -----------------------------------------------------------------------------------------


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"", "seven bytes": b"1234567", "a header longer than the file": file_of({}, length=1000),
    "a header of 2^64 bytes": file_of({}, length=2**64 - 1), "not JSON": file_of(b"<html></html>"),
    "a list": file_of([1]), "deep": file_of(b"[" * 100_000), "not text": file_of(b"\xff\xfe{}"),
    "overlapping": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "twice the same bytes": file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "negative": file_of({"a": entry(-8, 0)}, bytes(8)), "backwards": file_of({"a": entry(8, 0)}, bytes(8)),
    "negative shape": file_of({"a": entry(0, 8, (-1, -2))}, bytes(8)),
    "a wrong size": file_of({"a": entry(0, 8, (3,))}, bytes(8)),
    "a huge shape": file_of({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)),
    "not a number": file_of({"a": entry(0, 8, ("2",))}, bytes(8)),
    "true": file_of({"a": entry(0, 4, (True,))}, bytes(4)),
    "an unknown type": file_of({"a": entry(0, 8, dtype="F8")}, bytes(8)),
    "whole numbers": file_of({"a": entry(0, 16, dtype="I64")}, bytes(16)),
    "a type that is a list": file_of({"a": entry(0, 8, dtype=[])}, bytes(8)),
    "no type": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "cut short": file_of({"a": entry(0, 8)}, bytes(7)), "too long": file_of({"a": entry(0, 8)}, bytes(9)),
    "metadata of another kind": file_of({"__metadata__": 3, "a": entry(0, 8)}, bytes(8)),
    "no metadata but noise": file_of({"__metadata__": {"nanodino": "{"}, "a": entry(0, 8)}, bytes(8)),
    "a name that moves the cursor": file_of({"a\n\x1b[2J": entry(0, 8)}, bytes(8)),
    "three places": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_one_sentence(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    refused("w.safetensors is no intact safetensors file", tmp_path / "w.safetensors")


def test_claims_that_no_network_can_keep(tmp_path):
    m = tiny()
    for claim in (dict(num_heads=0), dict(num_heads=7), dict(num_heads=True), dict(layerscale=float("nan")),
                  dict(interpolate_offset="much")):  # fmt: skip
        export.write_safetensors(tmp_path / "w.safetensors", weights.rename(m.state_dict(), "timm"), claim)
        refused("no network is like that", tmp_path / "w.safetensors")
    claim = dict(depth=10**9, embed_dim=10**9, surprise=1)  # what the shapes say is not asked of the file
    export.write_safetensors(tmp_path / "w.safetensors", weights.rename(m.state_dict(), "timm"), claim)
    same_features(m, load_backbone(tmp_path / "w.safetensors"), [(6, 6)])


@pytest.mark.parametrize("dtype", weights.DTYPES.values(), ids=weights.DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_every_type_at_any_place(dtype, shift, tmp_path):
    """Some files don't align their tensors."""
    x, file = torch.randn(3, 5, dtype=dtype), tmp_path / "w.safetensors"
    export.write_safetensors(file, {"a": x, "b": x[:0], "c": x[0, 0]}, {})
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    file.write_bytes((n + shift).to_bytes(8, "little") + raw[8 : 8 + n] + b" " * shift + raw[8 + n :])
    tensors, _ = weights.read_safetensors(file)
    assert (
        torch.equal(tensors["a"], x) and tensors["b"].shape == (0, 5) and torch.equal(tensors["c"], x[0, 0])
    )


def test_half_precision_files_load_as_fp32(tmp_path):
    m = tiny(**REGISTERS)
    tensors = {k: v.half() for k, v in weights.rename(m.state_dict(), "hf").items()}
    export.write_safetensors(tmp_path / "w.safetensors", tensors, m.arch)
    back = load_backbone(tmp_path / "w.safetensors")
    assert all(torch.equal(v.half().float(), back.state_dict()[k]) for k, v in m.state_dict().items())


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space"):
        export.write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


# ---- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_says_which_file_goes_where(cache, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "urlopen", no_network)
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    with pytest.raises(
        UserError, match=f"{url} cannot be fetched .no route.*{cache}/dinov2_vits14_reg4_pretrain"
    ):
        weights.download("dinov2_vits14_reg4")
    with pytest.raises(UserError, match="no released model"):
        weights.download("dinov2_vitx14")
    refused(f"no weights at dinov2_vits14: put Meta's file at {cache}", "dinov2_vits14")
    assert not list(cache.glob("*"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "www" / "dinov2_vits14"
    folder.mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            if "_reg4" in self.path:  # promises more than it sends
                self._headers_buffer = [
                    re.sub(rb"(Content-Length: )\d+", rb"\g<1>9999", h) for h in self._headers_buffer
                ]
            super().end_headers()

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "BASE", f"http://127.0.0.1:{httpd.server_port}")
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_download(cache, server, monkeypatch, capsys):
    m = tiny(embed_dim=384, num_heads=6, depth=1, patch_size=14, img_size=28)
    torch.save(m.state_dict(), server / "dinov2_vits14_pretrain.pth")
    monkeypatch.setattr(sys, "argv", ["export.py", "dinov2_vits14", "--download"])
    export.main()
    assert str(cache / "dinov2_vits14_pretrain.pth") in capsys.readouterr().out
    same_features(m, load_backbone("dinov2_vits14"), [(2, 2)])  # from now on without --download
    (server / "dinov2_vits14_pretrain.pth").unlink()
    assert weights.download("dinov2_vits14").is_file()  # nothing is fetched twice
    (server / "dinov2_vits14_reg4_pretrain.pth").write_bytes(b"PK, and then the line is dead")
    with pytest.raises(UserError, match="ended after 29 of 9999|more expected|IncompleteRead"):
        weights.download("dinov2_vits14_reg4")
    monkeypatch.setattr(weights, "BASE", weights.BASE + "/nowhere")
    with pytest.raises(UserError, match="404"):
        weights.download("dinov2_vits14_reg4")
    assert [p.name for p in cache.iterdir()] == ["dinov2_vits14_pretrain.pth"]


def test_a_web_page_is_no_weights_file(cache, server):
    (server / "dinov2_vits14_pretrain.pth").write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="a web page came instead"):
        weights.download("vits14")


# ---- torch.hub and the real packages ---------------------------------------------------------------------


def test_torch_hub(tmp_path):
    load = functools.partial(torch.hub.load, str(ROOT), source="local", verbose=False)
    model = load("vits14_reg")
    tokens = model(torch.zeros(1, 3, 28, 28))
    assert tokens.cls.shape == (1, 384) and tokens.registers.shape[1] == 4 and not model.training
    values = {k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}
    torch.save(values, tmp_path / "w.pth")
    same_tensors(values, load("vits14_reg", weights=tmp_path / "w.pth").state_dict())
    for other in ("vitb14_reg", "vits14"):
        with pytest.raises(UserError, match=f"not the vit_{'base' if 'b' in other else 'small'} "):
            load(other, weights=tmp_path / "w.pth")
    import hubconf

    assert all(callable(getattr(hubconf, f"vit{s}14{r}")) for s in "sblg" for r in ("", "_reg"))


@kinds
def test_against_transformers(kw, tmp_path):
    transformers = pytest.importorskip("transformers")
    m = tiny(**kw)
    export.write_hf(m, tmp_path)
    cls = transformers.Dinov2WithRegistersModel if m.num_register_tokens else transformers.Dinov2Model
    theirs, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    same_as_theirs(theirs, m)


def same_as_theirs(theirs, m):
    """At the native size always; at others, and not square, where positions are interpolated alike: with
    registers (without, ours has the released offset of 0.1, theirs none)."""
    p, native = m.patch_size, m.arch["img_size"]
    for h, w in ((native, native), *(((5 * p, 5 * p), (3 * p, 7 * p)) if m.num_register_tokens else [])):
        x = torch.randn(2, 3, h, w)
        with torch.no_grad():
            out, tokens = theirs.eval()(x).last_hidden_state, m(x)
        ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
        torch.testing.assert_close(out, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
def test_models_made_by_transformers(registers, swiglu, tmp_path):
    """The other direction: theirs are drawn at random, saved by them, and read here."""
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    shape = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=4,
                 use_swiglu_ffn=swiglu)  # fmt: skip
    shape |= dict(num_register_tokens=registers) if registers else {}
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape))
    with torch.no_grad():
        for x in theirs.parameters():
            x += 0.1 * torch.randn(x.shape)
    theirs.save_pretrained(tmp_path / "model")
    same_as_theirs(theirs, load_backbone(tmp_path / "model"))


@kinds
def test_against_timm(kw, tmp_path):
    timm = pytest.importorskip("timm")
    m, file = tiny(**kw), tmp_path / "w.safetensors"
    theirs = eval(export.write_timm(m, file), {"timm": timm}).eval()
    x = torch.randn(2, 3, m.arch["img_size"], m.arch["img_size"])
    with torch.no_grad():
        tokens, out = m(x), theirs.forward_features(x)
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    torch.testing.assert_close(out, ours, rtol=0, atol=1e-5)


def test_against_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5).half(), "c": torch.randn(1).bfloat16()}
    export.write_safetensors(tmp_path / "ours", tensors, {})
    same_tensors(tensors, safetensors.load_file(tmp_path / "ours"))
    safetensors.save_file(tensors, tmp_path / "theirs")
    same_tensors(tensors, weights.read_safetensors(tmp_path / "theirs")[0])
