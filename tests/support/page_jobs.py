"""Job scripts, manifests and alerts of the documentation, read as those would who get them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from torch_eplb.exporters.metrics import METRICS, PREFIX

__all__ = ["check_alerts", "check_kubernetes", "check_slurm"]

SBATCH = (
    "account array begin bell chdir comment constraint contiguous core-spec cores-per-socket "
    "cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude "
    "exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus "
    "gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input "
    "job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu "
    "mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks "
    "ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output "
    "overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet "
    "reboot requeue reservation segment signal sockets-per-node spread-job stepmgr switches "
    "test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid "
    "use-min-nodes verbose wait wait-all-nodes wckey wrap"
).split()
"""Long options of sbatch, by its manual (Slurm 24.11)."""


def check_slurm(script: str, folder: Path) -> None:
    """bash parses it, sbatch knows its options, and torchrun takes what srun starts it with."""
    path = folder / "job.sh"
    path.write_text(script)
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    lines = script.splitlines()
    assert lines[0].startswith("#!"), "sbatch wants a script that names its interpreter"
    commands = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert number < commands, f"sbatch reads no options behind a command: {line}"
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)
            assert match, line
            assert match[1] in SBATCH, f"sbatch has no option --{match[1]}"
    words = shlex.split(script.replace("\\\n", " "), comments=True)
    check_torchrun(words[words.index("torchrun") + 1 :])


def check_torchrun(arguments: list[str]) -> Any:
    """What torchrun's own parser makes of them."""
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    parser = get_args_parser()
    with contextlib.redirect_stderr(said):
        try:
            # All options stand before the script, as torchrun wants it.
            parsed = parser.parse_args(arguments)
        except SystemExit:
            raise AssertionError(said.getvalue()) from None
    known = {option for action in parser._actions for option in action.option_strings}
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if option not in known]
    assert not unknown, f"unrecognized arguments: {unknown}"  # argparse takes abbreviations
    assert parsed.training_script.endswith(".py"), parsed.training_script
    return parsed


def check_kubernetes(manifest: str) -> None:
    """Kubernetes' own schema takes it, and the names in it fit together."""
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    documents = {document["kind"]: document for document in yaml.safe_load_all(manifest)}
    for document in documents.values():
        validate.validate(document, validate.latest_version(), strict=True)
    job, service = documents["Job"], documents["Service"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    selected = service["spec"]["selector"]["job-name"]
    assert selected == name, f"the service selects {selected}, the job is {name}"
    assert pod["subdomain"] == service["metadata"]["name"], "subdomain names the service"
    mounted = {mount["name"] for c in pod["containers"] for mount in c.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    program, *arguments = pod["containers"][0]["command"]
    assert program == "torchrun"
    parsed = check_torchrun(arguments)
    assert int(parsed.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert parsed.rdzv_endpoint.startswith(f"{name}-0.{pod['subdomain']}:")
    assert int(parsed.nproc_per_node) in pod["containers"][0]["resources"]["limits"].values()


def check_alerts(rules: str) -> None:
    """Prometheus' grammar takes every expression, and we export what they ask for."""
    promql = pytest.importorskip("promql_parser")
    yaml = pytest.importorskip("yaml")
    exported = {PREFIX + metric.name for metric in METRICS}
    for group in yaml.safe_load(rules)["groups"]:
        assert group.keys() == {"name", "rules"}
        for rule in group["rules"]:
            assert rule.keys() - {"for"} == {"alert", "expr", "annotations"}, rule
            promql.parse(rule["expr"])
            asked = set(re.findall(r"\btorch_eplb_\w+", rule["expr"]))
            assert asked, rule
            assert asked <= exported, asked - exported
            assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
