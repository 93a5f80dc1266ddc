"""Signatures: a folder that is as it was signed holds, wherever it lies; one of which a file, the list or the key is another does not."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import test_push
import verified
from click.testing import CliRunner
from hub_server import HubServer
from huggingface_hub import snapshot_download
from test_push import REPO, SOURCE

signing = pytest.importorskip("model_signing.signing", reason="zoo-weights[sign] is not installed")
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import zoo
from zoo import sign
from zoo.check import check
from zoo.cli import _common, cli
from zoo.errors import ZooError
from zoo.push import push
from zoo.verify import certificate

canon, hub = test_push.canon, test_push.hub  # its fixtures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """private.pem and public.pem, locked.pem (password: pw), and keys of somebody else's and of another kind."""
    folder = tmp_path_factory.mktemp("keys")

    def write(
        name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes | None = None
    ) -> None:
        lock = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
        (folder / name).write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock))

    mine, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    write("private.pem", mine)
    write("locked.pem", mine, b"pw")
    write("rsa.pem", rsa.generate_private_key(65537, 2048))
    for name, key in (("public.pem", mine), ("other.pem", other)):
        spki = pem.PublicFormat.SubjectPublicKeyInfo
        (folder / name).write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, spki))
    return folder


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    folder = verified.copy(verified.canonical("llama", "bfloat16"), tmp_path / "canon")
    assert zoo.verify(folder, against=SOURCE, level="plan").passed
    sign.sign(folder, keys / "private.pem")
    return folder


def refused(folder: Path, key: Path) -> str:
    with pytest.raises(ZooError) as e:
        sign.check(folder, key)
    return str(e.value)


def test_a_signed_folder_holds_wherever_it_lies_and_every_change_is_named(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    there = shutil.copytree(signed, tmp_path / "downloaded")
    (there / ".gitattributes").write_text("the Hub's")
    (there / ".cache" / "huggingface").mkdir(parents=True)
    (there / ".cache" / "huggingface" / "x.metadata").write_text("the library's")
    assert sign.check(there, keys / "public.pem") == len(list(signed.iterdir())) - 1
    odd = [p for p in certificate.check(there) if not p.startswith(("source", "it compared shapes alone"))]
    assert not odd, "a signature is no file that the certificate should know"
    weights = next(there.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (there / "generation_config.json").unlink()
    (there / "modeling.py").write_text("import os")
    said = refused(there, keys / "public.pem")
    assert "not as it was signed" in said and "Digest(" not in said
    assert (
        f"Hash mismatch for '{weights.name}'" in said
        and ": modeling.py" in said
        and ": generation_config.json" in said
    )


def test_another_key_an_edited_list_and_what_is_no_signature_are_refused(signed: Path, keys: Path) -> None:
    assert "does not match the provided public key" in refused(signed, keys / "other.pem")
    assert "no BEGIN PUBLIC KEY" in refused(signed, keys / "private.pem")
    bundle = json.loads((signed / "model.sig").read_text())
    envelope = bundle["dsseEnvelope"]
    envelope["payload"] = base64.b64encode(
        base64.b64decode(envelope["payload"]).replace(b"zoo.json", b"moo.json")
    ).decode()
    (signed / "model.sig").write_text(json.dumps(bundle))
    assert "not signed by the key" in refused(signed, keys / "public.pem")
    for text in ("{}", "no JSON", "[]", '{"dsseEnvelope": {"payload": "e30="}}', '{"dsseEnvelope": 3}'):
        (signed / "model.sig").write_text(text)
        assert "model.sig: no signature" in refused(signed, keys / "public.pem"), text
    (signed / "model.sig").unlink()
    assert "is not signed" in refused(signed, keys / "public.pem")
    with pytest.raises(ZooError, match="P-256, P-384 or P-521"):
        sign.sign(signed, keys / "rsa.pem")
    (signed / "link").symlink_to("/etc/hostname")
    with pytest.raises(ZooError, match="symlink"):
        sign.sign(signed, keys / "private.pem")
    assert not (signed / "model.sig").exists()


@pytest.mark.parametrize(
    "payload", [b"[" * 200_000, b'{"predicate": {"resources": []}, "a": [' + b"[]," * 3_000_000 + b"[]]}"]
)
def test_a_list_that_grows_when_it_is_read_is_refused(signed: Path, tmp_path: Path, payload: bytes) -> None:
    told = json.loads((signed / sign.SIGNATURE).read_text())
    told["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (path := tmp_path / sign.SIGNATURE).write_text(json.dumps(told))
    with pytest.raises(ZooError, match="nested too deeply|lists and objects|a text, or numbers, of"):
        sign.listed(path)


def test_a_large_file_that_is_not_signed_is_named_and_not_hashed(signed: Path, keys: Path) -> None:
    with open(signed / "\udcff.safetensors", "wb") as f:
        f.truncate(1 << 40)
    said = refused(signed, keys / "public.pem")
    assert "not as it was signed: it also has \\udcff.safetensors, of 1,0" in said and said.encode()


def test_a_key_that_is_no_file_is_one_sentence(signed: Path, tmp_path: Path) -> None:
    for call in (sign.check, sign.sign):
        with pytest.raises(ZooError, match="directory"):
            call(signed, tmp_path)


def test_the_commands_sign_with_a_password_check_and_verify_without_ending_the_signature(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / "model.sig").unlink()
    done = CliRunner().invoke(cli, ["sign", str(signed), "--key", str(keys / "locked.pem")], input="pw\n")
    assert done.exit_code == 0 and "signed: " in done.output, done.output
    public = ["--signature", str(keys / "public.pem")]
    assert _common.run(cli, ["check", str(signed), *public]) == 0
    assert "are as they were signed" in capsys.readouterr().err
    assert (
        _common.run(cli, ["verify", str(signed), "--against", str(SOURCE), "--level", "bytes", *public]) == 0
    )
    assert check(signed, signed_by=keys / "public.pem").whole, "verify left the certificate as it was"
    assert _common.run(cli, ["verify", str(signed), "--signature", str(keys / "other.pem")]) == 1
    (signed / "parity.json").unlink()
    assert _common.run(cli, ["check", str(signed), *public]) == 1
    said = capsys.readouterr().out
    assert "Missing files" in said and "NOT whole" in said


def test_what_is_pushed_with_a_key_is_signed_and_holds_after_a_download(
    hub: HubServer,
    canon: Path,
    keys: Path,
    tmp_path: Path,
) -> None:
    done = push(canon, REPO, key=keys / "private.pem")
    assert done.files["model.sig"] == len(test_push.files(hub)["model.sig"])
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))
    report = check(copy, signed_by=keys / "public.pem")
    assert report.whole and "signature model.sig" in str(report.notes)
    hub.repos[REPO].commit({"README.md": "My own."})
    with pytest.raises(ZooError, match="which the signature would not be of"):
        push(canon, REPO, key=keys / "private.pem")
