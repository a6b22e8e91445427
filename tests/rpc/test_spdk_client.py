"""SPDK's own client drives the daemon, and recorded exchanges with SPDK have the same shape here."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from spdk.rpc import config as spdk_config
from spdk.rpc.client import JSONRPCException

from tests.rpc.conftest import eventually, exchange
from virtio_bdev import RateLimits, config

RECORDED = Path(__file__).parents[1] / "data/spdk/rpc"


def attach(client, target, name, kind, **more):
    return client.call(
        "bdev_virtio_attach_controller",
        {"name": name, "trtype": "user", "traddr": target.path, "dev_type": kind, **more},
    )


def shape(value):
    """Keys and types of a JSON value; of a list, those of its first."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_attach_list_save_and_detach(client, scsi, blk):
    assert attach(client, blk, "Fast0", "blk", vq_count=2) == ["Fast0"]
    assert attach(client, scsi, "S", "scsi") == ["St0", "St3l1"]
    (bdev,) = client.call("bdev_get_bdevs", {"name": "Fast0"})
    assert (bdev["block_size"], bdev["num_blocks"]) == (512, 32768)
    assert bdev["driver_specific"]["virtio"]["vq_count"] == 2
    names = [bdev["name"] for bdev in client.call("bdev_get_bdevs")]
    assert names == ["Fast0", "St0", "St3l1"]
    (found,) = client.call("bdev_get_bdevs", {"name": bdev["uuid"]})
    assert found == bdev
    assert shape(client.call("bdev_virtio_scsi_get_devices")) == shape(
        json.loads((RECORDED / "bdev_virtio_scsi_get_devices.json").read_text())
    )

    saved = io.StringIO()
    spdk_config.save_config(client, saved)
    assert json.loads(saved.getvalue()) == client.call("save_config")
    part = client.call("save_subsystem_config", {"name": "bdev"})
    assert client.call("save_config")["subsystems"] == [part]
    assert client.call("bdev_virtio_detach_controller", {"name": "Fast0"}) is True
    assert client.call("bdev_virtio_detach_controller", {"name": "S"}) is True
    assert client.call("bdev_get_bdevs") == []
    saved.seek(0)
    spdk_config.load_config(client, saved)
    assert client.call("bdev_get_bdevs", {"name": "Fast0"}) == [bdev]
    assert [bdev["name"] for bdev in client.call("bdev_get_bdevs")] == names
    again = io.StringIO()
    spdk_config.save_config(client, again)
    assert again.getvalue() == saved.getvalue()


def test_our_own_load_config_is_all_or_nothing(client, blk):
    attach(client, blk, "Fast0", "blk")
    config = client.call("save_config")
    client.call("bdev_virtio_detach_controller", {"name": "Fast0"})
    config["subsystems"].append({"subsystem": "nbd", "config": [{"method": "nbd_start_disk"}]})
    assert client.call("load_config", config) == {"bdevs": ["Fast0"], "skipped": ["nbd_start_disk"]}
    client.call("bdev_virtio_detach_controller", {"name": "Fast0"})
    calls = config["subsystems"][0]["config"]
    calls.append({"method": "bdev_virtio_attach_controller", "params": calls[0]["params"] | {"name": "B"}})
    calls[-1]["params"]["traddr"] = "/nowhere"
    with pytest.raises(JSONRPCException, match="no such socket"):
        client.call("load_config", config)
    assert client.call("bdev_get_bdevs") == []
    calls[-1] = {"method": "bdev_set_qos_limit", "params": {"name": "Fast0t9", "rw_ios_per_sec": 1000}}
    with pytest.raises(JSONRPCException, match="No such device"):
        client.call("load_config", {"subsystems": config["subsystems"]})  # the client adds to what it sends
    assert client.call("bdev_get_bdevs") == []


def test_what_happens_to_disks_is_notified_and_waited_for(client, scsi):
    attach(client, scsi, "S", "scsi")
    scsi.control("add_disk", target=5, lun=0, disk="ram:4M")
    (bdev,) = client.call("bdev_get_bdevs", {"name": "St5", "timeout": 10000})
    assert bdev["num_blocks"] == 8192
    scsi.control("resize_disk", target=5, lun=0, size=8 << 20)
    assert eventually(lambda: client.call("bdev_get_bdevs", {"name": "St5"})[0]["num_blocks"] == 16384)
    scsi.control("remove_disk", target=5, lun=0)
    seen = lambda: client.call("notify_get_notifications", {"id": 2})  # noqa: E731
    assert eventually(lambda: len(seen()) == 3)
    kinds = [(one["id"], one["type"], one["ctx"]) for one in seen()]
    assert kinds == [(2, "bdev_register", "St5"), (3, "bdev_resize", "St5"), (4, "bdev_unregister", "St5")]
    assert client.call("notify_get_notifications", {"id": 1, "max": 1})[0]["ctx"] == "St3l1"
    recorded = json.loads((RECORDED / "notify_get_notifications.json").read_text())
    assert shape(seen()) == shape(recorded)
    types = json.loads((RECORDED / "notify_get_types.json").read_text())
    assert set(client.call("notify_get_types")) <= set(types)


def test_rate_limits_are_set_shown_and_saved(client, blk):
    attach(client, blk, "VirtioBlk1", "blk")
    limit = {"name": "VirtioBlk1", "rw_ios_per_sec": 19001}
    assert client.call("bdev_set_qos_limit", limit) is True
    assert client.call("bdev_set_qos_limit", {"name": "VirtioBlk1", "w_mbytes_per_sec": 5}) is True
    (bdev,) = client.call("bdev_get_bdevs")
    recorded = json.loads((RECORDED / "bdev_get_bdevs_qos.json").read_text())[0]
    assert shape(bdev["assigned_rate_limits"]) == shape(recorded["assigned_rate_limits"])
    assert bdev["assigned_rate_limits"] == recorded["assigned_rate_limits"] | {"w_mbytes_per_sec": 5}
    config = client.call("save_config")
    client.call("bdev_virtio_detach_controller", {"name": "VirtioBlk1"})
    client.call("load_config", config)
    assert client.call("bdev_get_bdevs") == [bdev]
    client.call("bdev_set_qos_limit", {"name": "VirtioBlk1", "rw_ios_per_sec": 0, "w_mbytes_per_sec": 0})
    assert not any(client.call("bdev_get_bdevs")[0]["assigned_rate_limits"].values())


def test_what_is_no_rate_limit_is_refused_and_changes_nothing(client, blk):
    attach(client, blk, "Fast0", "blk")
    client.call("bdev_set_qos_limit", {"name": "Fast0", "rw_ios_per_sec": 1000})
    too_many = {"rw_ios_per_sec": 10**12 + 1}
    for bad in ({"rw_ios_per_sec": -5}, {"rw_ios_per_sec": -1000}, {"r_mbytes_per_sec": -1}, too_many, {}):
        with pytest.raises(JSONRPCException, match="-32602") as caught:
            client.call("bdev_set_qos_limit", {"name": "Fast0"} | bad)
        for key, value in bad.items():
            assert f"{key} {value}, want a number from 0 to " in str(caught.value)
    assert client.call("bdev_get_bdevs")[0]["assigned_rate_limits"]["rw_ios_per_sec"] == 1000


def test_levels_and_flags_of_logs(client):
    assert client.call("log_get_level") == "WARNING"
    assert client.call("log_set_level", {"level": "DEBUG"}) is True
    assert client.call("log_get_level") == "DEBUG"
    assert not any(client.call("log_get_flags").values())
    client.call("log_set_flag", {"flag": "scsi"})
    assert [name for name, on in client.call("log_get_flags").items() if on] == ["scsi"]
    client.call("log_set_flag", {"flag": "all"})
    assert all(client.call("log_get_flags").values())
    client.call("log_clear_flag", {"flag": "all"})
    assert not any(client.call("log_get_flags").values())
    with pytest.raises(JSONRPCException, match="want one of"):
        client.call("log_set_level", {"level": "loud"})


def test_the_version_has_the_fields_of_spdks(client):
    recorded = json.loads((RECORDED / "spdk_get_version.json").read_text())
    ours = client.call("spdk_get_version")
    assert set(ours) == set(recorded)
    assert set(recorded["fields"]) - set(ours["fields"]) == {"commit"}
    assert client.call("framework_wait_init") is True


def test_iostat_and_histogram_have_the_shape_of_spdks(client, blk):
    attach(client, blk, "VirtioBlk0", "blk")
    recorded = json.loads((RECORDED / "bdev_get_iostat_blk.json").read_text())
    assert shape(client.call("bdev_get_iostat")) == shape(recorded)
    assert shape(client.call("bdev_get_iostat", {"names": ["VirtioBlk0"]})) == shape(recorded)
    one = client.call("bdev_get_iostat", {"names": ["VirtioBlk0"], "per_channel": True})
    assert one["name"] == "VirtioBlk0" and one["channels"] == []
    assert client.call("bdev_reset_iostat", {"name": "VirtioBlk0"}) is True
    assert client.call("bdev_reset_iostat", {"mode": "maxmin"}) is True
    assert shape(client.call("bdev_get_iostat", {"reset_mode": "error"})) == shape(recorded)
    with pytest.raises(JSONRPCException, match="no histogram is kept"):
        client.call("bdev_get_histogram", {"name": "VirtioBlk0"})
    assert client.call("bdev_enable_histogram", {"name": "VirtioBlk0", "enable": True}) is True
    ours = client.call("bdev_get_histogram", {"name": "VirtioBlk0"})
    recorded = json.loads((RECORDED / "bdev_get_histogram.json").read_text())
    assert shape(ours) == shape(recorded)
    for answer in (ours, recorded):  # the bounds are each one's own: buckets for the ranges between them
        buckets = len(base64.b64decode(answer["histogram"])) // 8
        ranges = answer["max_range"] - answer["min_range"] + 1
        assert buckets == ranges << answer["granularity"]


def recorded_requests():
    """Each recorded request that has an error for answer: its method and parameters, and the code."""
    for path in sorted(RECORDED.glob("*.wire.json")):
        record = json.loads(path.read_text())
        if not record["response_text"]:
            continue
        request, answer = json.loads(record["request"]), json.loads(record["response_text"])
        yield path.name, request["method"], request.get("params"), answer["error"]["code"]
    for path in sorted(RECORDED.glob("*.json")):
        parts = re.fullmatch(
            r"(?s)request:\n(\{.*?\n\})\nGot JSON-RPC error response\nresponse:\n(\{.*\})\n",
            path.read_text(),
            re.S,
        )
        if parts:
            params = json.loads(parts[1])
            method = params.pop("method")
            del params["req_id"]
            yield path.name, method, params, json.loads(parts[2])["code"]


@pytest.mark.parametrize("recorded", list(recorded_requests()), ids=lambda recorded: recorded[0])
def test_errors_have_the_codes_of_spdk(daemon, client, blk, recorded):
    _, method, params, code = recorded
    if method == "bdev_get_histogram":
        attach(client, blk, params["name"], "blk")
    request = {"jsonrpc": "2.0", "id": 7, "method": method}
    if params is not None:
        request["params"] = params
    answer = json.loads(exchange(daemon, json.dumps(request).encode()))
    assert set(answer) == {"jsonrpc", "id", "error"} and answer["id"] == 7
    assert answer["error"]["code"] == code
    assert isinstance(answer["error"]["message"], str)


def test_what_is_no_json_closes_the_connection_as_spdk_does(daemon):
    record = json.loads((RECORDED / "invalid_json.wire.json").read_text())
    assert exchange(daemon, record["request"].encode()) == record["response_text"].encode() == b""


def test_a_file_that_spdk_saved_is_read(tmp_path):
    wanted = config.load(str(RECORDED / "save_config.json"))
    assert [line.spec.name for line in wanted.lines] == ["VirtioScsi0", "VirtioBlk0", "VirtioBlk1"]
    assert [line.spec.dev_type for line in wanted.lines] == ["scsi", "blk", "blk"]
    assert [(line.spec.queues, line.spec.queue_size) for line in wanted.lines] == [
        (2, 512),
        (2, 256),
        (1, 512),
    ]
    assert wanted.limits == {"VirtioBlk1": RateLimits(rw_ios_per_sec=20000)}
    assert "bdev_set_options" in wanted.ignored and "sock_set_default_impl" in wanted.ignored
