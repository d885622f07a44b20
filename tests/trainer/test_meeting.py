import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from ckptd.errors import ConfigError, MeetingError
from ckptd.trainer import meeting as module
from ckptd.trainer.boards import MAX_VALUE_BYTES, LocalBoard, StoreBoard, TcpBoard
from ckptd.trainer.meeting import Meeting


def serve():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
    )


@pytest.fixture(params=["local", "tcp", "hash", "file"])
def board(request, tmp_path):
    if request.param == "local":
        yield LocalBoard()
    elif request.param == "tcp":
        server = serve()
        board = TcpBoard("127.0.0.1", server.port, timeout_s=5)
        yield board
        board.close()
    else:
        store = dist.HashStore() if request.param == "hash" else dist.FileStore(str(tmp_path / "s"))
        yield StoreBoard(lambda: store)


@pytest.fixture
def environ(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def in_threads(count, work):
    """Run `work(rank)` on `count` threads; return the results or errors by rank."""
    results = [None] * count

    def run(rank):
        try:
            results[rank] = work(rank)
        except MeetingError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_values_are_bytes_and_absent_keys_are_none(board):
    board.set("a", b"\0\xff")
    board.set("e", b"")
    assert board.get_many(["a", "b", "e"]) == [b"\0\xff", None, b""]
    assert board.get_many([]) == []
    assert board.has_all([])
    assert board.has_all(["a", "e"])
    assert not board.has_all(["a", "b"])
    board.set("a", b"2")
    assert board.get_many(["e", "a"]) == [b"", b"2"]


def test_a_deleted_key_is_absent_and_may_be_deleted_again(board):
    board.set("a", b"1")
    board.delete("a")
    board.delete("a")
    assert board.get_many(["a"]) == [None]


def test_a_wait_ends_when_the_key_comes(board):
    thread = threading.Thread(target=board.set, args=("late", b"1"))
    thread.start()
    board.wait(["late"], 30)
    thread.join()


def test_a_wait_names_what_is_absent(board):
    board.set("a", b"1")
    with pytest.raises(MeetingError, match=r"absent after 0.01 s: b, c$"):
        board.wait(["a", "b", "c"], 0.01)


def test_a_wait_does_not_keep_others_from_the_board(board):
    started = threading.Event()

    def wait():
        started.set()
        board.wait(["never"], 30)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait(10)
    board.set("other", b"1")
    assert board.get_many(["other"]) == [b"1"]
    board.set("never", b"1")
    thread.join(10)
    assert not thread.is_alive()


def test_a_value_too_large_for_the_server_is_refused_before_it_is_sent(board):
    board.set("most", bytes(MAX_VALUE_BYTES))
    with pytest.raises(MeetingError, match="too: 7340033 bytes"):
        board.set("too", bytes(MAX_VALUE_BYTES + 1))
    assert board.get_many(["most", "too"]) == [bytes(MAX_VALUE_BYTES), None]


def test_a_server_that_went_away_is_a_meeting_error(capfd):
    server = serve()
    board = TcpBoard("127.0.0.1", server.port, timeout_s=0.3)
    board.set("a", b"1")
    del server
    for request in (lambda: board.has_all(["a"]), lambda: board.set("a", b"2")):
        with pytest.raises(MeetingError, match="is the process of rank 0 alive"):
            request()


def test_a_connection_is_made_anew_after_an_error():
    store = dist.HashStore()
    connections = iter([dist.PrefixStore("a", store), dist.PrefixStore("a", store)])
    board = StoreBoard(lambda: next(connections))
    board.set("k", b"1")

    def fail(_):
        raise dist.DistNetworkError("reset")

    with pytest.raises(MeetingError, match="reset"):
        board._ask(fail)
    assert board.get_many(["k"]) == [b"1"]
    assert next(connections, None) is None


def test_all_ranks_gather_the_same_payloads_over_tcp():
    server = serve()

    def rank_of(rank):
        meeting = Meeting(TcpBoard("127.0.0.1", server.port, 10), rank, 4)
        return meeting.gather("resume 1", b"from %d" % rank, 30)

    assert in_threads(4, rank_of) == [[b"from 0", b"from 1", b"from 2", b"from 3"]] * 4


def test_gather_names_the_ranks_that_did_not_come():
    board = LocalBoard()
    results = in_threads(2, lambda rank: Meeting(board, rank, 4).gather("resume 1", b"", 0.05))
    for error in results:
        assert isinstance(error, MeetingError)
        assert str(error) == "ranks 2, 3 of 4 did not reach 'resume 1' in 0.05 s"


def test_rank_0_announces_and_the_others_hear():
    board = LocalBoard()
    zero, one = Meeting(board, 0, 2), Meeting(board, 1, 2)
    with pytest.raises(MeetingError, match=r"rank 0 did not announce 'attempt' in 0.01 s"):
        one.hear("attempt", 0.01)
    zero.announce("attempt", b"7")
    assert one.hear("attempt", 0.01) == b"7"


def test_ranks_read_what_others_published_until_it_is_withdrawn():
    board = LocalBoard()
    zero, one = Meeting(board, 0, 2), Meeting(board, 1, 2)
    zero.publish("n", b"0")
    assert one.read("n", 0) == b"0"
    assert one.read("n", 1) is None
    assert one.read_all("n") is None
    assert not one.has_all("n")
    one.publish("n", b"1")
    assert zero.read_all("n") == [b"0", b"1"]
    one.withdraw("n")
    assert zero.read_all("n") is None


def test_shared_values_are_sent_once():
    board = LocalBoard()
    zero, one = Meeting(board, 0, 2), Meeting(board, 1, 2)
    zero.share("x", b"1")
    one.share("x", b"2")
    assert one.fetch(["x", "y"]) == [b"1", None]
    one.forget("x")
    assert zero.fetch(["x"]) == [None]


def test_meetings_with_other_prefixes_do_not_hear_each_other():
    board = LocalBoard()
    Meeting(board, 0, 1, prefix="a").publish("n", b"0")
    assert Meeting(board, 0, 1, prefix="b").read("n", 0) is None


def test_one_process_without_torch_distributed_is_a_job_of_one(environ):
    meeting = Meeting.of_job("memory://a", 1)
    assert (meeting.rank, meeting.world_size, meeting.local_world_size) == (0, 1, 1)
    assert meeting.gather("t", b"x", 0.01) == [b"x"]


def test_a_rank_of_many_must_initialise_torch_distributed_first(environ):
    environ.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="init_process_group"):
        Meeting.of_job("memory://a", 1)


def test_the_ranks_of_every_start_look_for_each_other_in_one_place(environ):
    def sign(*args):
        return module._call_sign(*args)

    first = [sign("memory://starts", 2), sign("memory://starts", 2), sign("memory://starts", 3)]
    assert len({*first, sign("memory://others", 2)}) == 4
    environ.setattr(module, "_ordinals", {})  # as in a new process
    environ.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # of one agent only
    again = [sign("memory://starts", 2), sign("memory://starts", 2), sign("memory://starts", 3)]
    assert again == first


RANK = """
import sys, torch.distributed as dist
from ckptd.trainer.boards import TcpBoard
from ckptd.trainer.meeting import Meeting
rank, how = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=how, rank=rank, world_size=2)
meeting = Meeting.of_job("memory://x", 60)
assert isinstance(meeting._board, TcpBoard) == how.startswith("tcp"), meeting._board
assert (meeting.rank, meeting.world_size, meeting.local_world_size) == (rank, 2, 2)
assert meeting.gather("here", b"%d" % rank, 60) == [b"0", b"1"]
if rank == 0:
    meeting.announce("bye", b"!")
assert meeting.hear("bye", 60) == b"!"
meeting.gather("all heard", b"", 60)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["tcp", "file"])
def test_the_ranks_of_a_process_group_meet_over_its_store(how, tmp_path):
    if how == "tcp":
        server = serve()  # finds a free port; torch's servers of one process would share it
        url = f"tcp://127.0.0.1:{server.port}"
        del server
    else:
        url = f"file://{tmp_path}/rendezvous"
    environ = {**os.environ, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), url], env=environ, stderr=-1)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=90)
        assert rank.returncode == 0, errors.decode()


ELASTIC = """
import os, sys, torch.distributed as dist
from ckptd.trainer import meeting as module
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
place = None
for start in (1, 2):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank * start)
    module._ordinals.clear()  # as in a new process
    dist.init_process_group("gloo", store=dist.PrefixStore(f"{start}", store), rank=rank, world_size=2)
    while rank == 0 and place is not None and store.get(place) == before:
        pass  # in the second start rank 1 comes first, and finds all that the first start left
    meeting = module.Meeting.of_job("memory://x", 60)
    if rank == 0:
        meeting.announce("attempt", b"%d" % start)
    assert meeting.hear("attempt", 60) == b"%d" % start
    assert meeting.gather("resume/1/1", b"%d" % start, 60) == [b"%d" % start] * 2
    place = os.path.dirname(meeting._prefix) + "/join/1"
    before = store.get(place)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_ranks_that_start_again_over_a_store_that_stayed_read_nothing_of_before():
    server = serve()
    ranks = [
        subprocess.Popen([sys.executable, "-c", ELASTIC, str(rank), str(server.port)], stderr=-1)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=90)
        assert rank.returncode == 0, errors.decode()


def test_a_job_that_does_not_meet_closes_its_connection_and_says_who_is_missing(environ):
    board = LocalBoard()
    closed = []
    environ.setattr(board, "close", lambda: closed.append(True))
    environ.setattr(dist, "is_initialized", lambda: True)
    environ.setattr(dist, "get_rank", lambda: 0)
    environ.setattr(dist, "get_world_size", lambda: 2)
    environ.setattr(module, "_board_of_job", lambda: board)
    with pytest.raises(MeetingError, match=r"rank 1 of 2 did not join in 0.01 s"):
        Meeting.of_job("memory://missing", 0.01)
    assert closed == [True]


def test_absent_keys_among_many_take_few_requests():
    requests = []

    class Counting(StoreBoard):
        def has_all(self, keys):
            requests.append(len(keys))
            return super().has_all(keys)

    store = dist.HashStore()
    board = Counting(lambda: store)
    keys = [str(number) for number in range(256)]
    for key in keys:
        if key != "77":
            board.set(key, key.encode())
    assert board.get_many(keys) == [None if key == "77" else key.encode() for key in keys]
    assert len(requests) < 20


def test_a_store_of_an_unknown_type_is_refused(environ):
    class Odd(dist.Store):
        pass

    odd = Odd()
    environ.setattr(dist.distributed_c10d, "_get_default_store", lambda: dist.PrefixStore("p", odd))
    with pytest.raises(ConfigError, match="Odd"):
        module._board_of_job()


def test_without_the_name_that_torch_keeps_the_environment_says_where(environ):
    environ.delattr(dist.distributed_c10d, "_get_default_store")
    with pytest.raises(ConfigError, match="TCPStore"):
        module._board_of_job()
    server = serve()
    environ.setenv("MASTER_ADDR", "127.0.0.1")
    environ.setenv("MASTER_PORT", str(server.port))
    board = module._board_of_job()
    board.set("a", b"1")
    assert server.get("a") == b"1"
