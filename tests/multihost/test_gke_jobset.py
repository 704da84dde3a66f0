"""launch/gke_jobset.yaml: only fields that exist, sizes that fit together, and what it does after each exit code."""

import copy
import math
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

MANIFEST = Path(__file__).resolve().parents[2] / "launch" / "gke_jobset.yaml"


def record(required="", optional="", **properties):
    """A mapping with these fields and no others; those not described may be anything."""
    names = [*required.split(), *optional.split()]
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": {name: {} for name in names} | properties,
    }


def some(item):
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 20}


WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
# What jobset.x-k8s.io/v1alpha2 (JobSet 0.6), batch/v1 and core/v1 (Kubernetes 1.31) say of the fields used here.
POD = record(
    "restartPolicy containers",
    "terminationGracePeriodSeconds nodeSelector",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    nodeSelector=WORDS,
    terminationGracePeriodSeconds=COUNT,
    containers=some(
        record(
            "name image",
            command=some({"type": "string"}),
            args=some({"type": "string"}),
            env=some(record("name value", name={"type": "string"}, value={"type": "string"})),
            resources=record("", "requests limits"),
        )
    ),
)
EXIT_CODES = record(
    "operator values",
    "containerName",
    operator={"enum": ["In", "NotIn"]},
    values={
        "type": "array",
        "items": {"type": "integer"},
        "uniqueItems": True,
        "minItems": 1,
        "maxItems": 255,
    },
)
JOB = record(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=record(
        "rules",
        rules=some(
            record(
                "action",
                action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                onExitCodes=EXIT_CODES,
                onPodConditions=some(record("type status")),
            )
        ),
    ),
    template=record("spec", spec=POD),
)
REASONS = [
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
]
JOBSET = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=record("name", annotations=WORDS, name={"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
    spec=record(
        "replicatedJobs",
        failurePolicy=record(
            "",
            maxRestarts=COUNT,
            rules=some(
                record(
                    "action",
                    "targetReplicatedJobs",
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
                    onJobFailureMessagePatterns={"type": "array", "items": {"type": "string"}},
                )
            ),
        ),
        replicatedJobs=some(record("name template", replicas=COUNT, template=record("spec", spec=JOB))),
    ),
)


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


@pytest.fixture
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def matches(rule, code, disrupted):
    """Whether a rule of podFailurePolicy is about a pod that ended so."""
    if "onPodConditions" in rule:
        return disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
    return (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In")


def after(manifest, job, code, disrupted=False):
    """What the controllers do when one pod ends with an exit code: the first rule that matches, on both levels."""
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if matches(rule, code, disrupted):
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            message = f"Container vlmjax for pod p failed with exit code {code} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", REASONS) and any(
            re.search(p, message) for p in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


def test_only_fields_that_exist(manifest):
    jsonschema.validate(manifest, JOBSET)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(wrong, JOBSET)


@pytest.mark.parametrize("code", [77, 78, 130])
def test_what_restarting_cannot_help_ends_the_run(manifest, job, code):
    assert after(manifest, job, code) == "FailJobSet"


@pytest.mark.parametrize(("code", "disrupted"), [(42, False), (42, True), (137, True), (75, True)])
def test_what_is_nobodys_fault_starts_all_pods_again_without_end(manifest, job, code, disrupted):
    assert after(manifest, job, code, disrupted) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize("code", [1, 75, 76, 134, 137, 143])
def test_everything_else_starts_all_pods_again_so_many_times(manifest, job, code):
    assert after(manifest, job, code) == "RestartJobSet"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_exit_codes_are_those_of_the_container_and_of_a_pod_that_stays_down(job):
    """Kubernetes refuses these rules for pods that it restarts in place."""
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (container,) = pod["containers"]
    for rule in (rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule):
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert 0 not in rule["onExitCodes"]["values"]


def test_the_slice_has_as_many_hosts_as_its_topology_needs(job):
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"]
    assert job["completions"] * chips == math.prod(map(int, topology.split("x")))


def test_it_runs_the_trainer_on_a_recipe_of_this_tree(job):
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "vlmjax.main"]
    options = dict(argument.split("=", 1) for argument in container["args"])
    assert (MANIFEST.parents[1] / options["--config"]).is_file()
    assert options["--workdir"].startswith("gs://")  # pods share nothing else
