"""Caltech's formats: real files of the benchmark, and files written by hand as the formats' descriptions have them."""

import json
import pickle
import re
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torchvision.io import ImageReadMode, decode_jpeg

from lit_compress.cli import main
from lit_compress.pedestrians import read_detections, read_truths, read_vbb, write_results
from lit_compress.pedestrians.annotations import Annotations, Detections, Frame, scenes_of
from lit_compress.pedestrians.formats import Truths, at_interval
from lit_compress.pedestrians.results import read_results
from lit_compress.pedestrians.video import SeqVideo
from tests.caltech_files import encoded, picture, vbb_text, write_seq, write_vbb

OBJECTS = [
    ("person", 2, [[100.5, 50, 20, 50], [101.5, 51, 20.25, 50]], [[0, 0, 0, 0], [101.5, 51, 20, 30]]),
    ("people", 1, [[300, 60, 80, 60]] * 4, [[0, 0, 0, 0]] * 4),
    ("person?", 3, [[10, 20, 5, 12]], [[0, 0, 0, 0]]),
    ("dog", 1, [[1, 2, 3, 4]], [[0, 0, 0, 0]]),
]
FRAMES = 5


def check_objects(frames, visible=True):
    """Whether the frames are those of OBJECTS, counted from 0."""
    assert [one.labels.tolist() for one in frames] == [[2], [1, 2], [1, 2, 3], [2], []]
    np.testing.assert_allclose(frames[1].boxes, [[99.5, 49, 20, 50], [299, 59, 80, 60]])
    np.testing.assert_allclose(frames[2].boxes[0], [100.5, 50, 20.25, 50])
    assert not frames[1].visible.any()
    np.testing.assert_allclose(frames[2].visible[0], [100.5, 50, 20, 30] if visible else 0)


# Videos


def test_the_real_video_is_read_as_another_decoder_reads_it(data_dir):
    path = data_dir("caltech") / "caltech" / "peds30.seq"
    video = SeqVideo(path)
    assert (len(video), video.width, video.height, video.frames) == (30, 640, 480, tuple(range(30)))
    assert video.fps == pytest.approx(30.3030303)
    content = path.read_bytes()
    # A second account of where images lie: from one start marker with a JFIF head to the next.
    starts = [found.start() for found in re.finditer(b"\xff\xd8\xff\xe0", content)]
    assert len(starts) == 30
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(content)], strict=True)):
        whole = torch.frombuffer(bytearray(content[start:end]), dtype=torch.uint8)
        # The two decoders are builds of one library that may round differently in places.
        off = (video[index].int() - decode_jpeg(whole, ImageReadMode.RGB).int()).abs()
        assert off.max() <= 2
        assert off.float().mean() < 0.05


def test_the_real_index_says_what_walking_finds(data_dir, tmp_path):
    folder = data_dir("caltech") / "caltech"
    alone = tmp_path / "peds30.seq"
    alone.write_bytes((folder / "peds30.seq").read_bytes())
    walked = SeqVideo(alone)
    indexed = SeqVideo(folder / "peds30.seq")
    assert (folder / "peds30-seek.mat").exists()
    assert [walked.encoded(index) for index in range(30)] == [indexed.encoded(index) for index in range(30)]
    assert loadmat(walked.save_index())["seek"].ravel().tolist() == loadmat(folder / "peds30-seek.mat")["seek"].ravel().tolist()
    assert torch.equal(SeqVideo(alone)[29], walked[29])


@pytest.mark.parametrize("padding", [8, 16])
@pytest.mark.parametrize("form", [1, 2, 102, 201, 100, 200])
def test_frames_of_every_kind_are_read(form, padding, tmp_path):
    images = [picture(index) for index in range(4)]
    write_seq(tmp_path / "V.seq", images, form, padding)
    video = SeqVideo(tmp_path / "V.seq")
    assert video.frames == (0, 1, 2, 3)
    for index in (3, 0, 2):
        frame = video[index]
        assert frame.dtype == torch.uint8
        expected = torch.from_numpy(images[index]).permute(2, 0, 1)
        if form in (102, 201):
            expected = decode_jpeg(torch.frombuffer(bytearray(encoded(images[index], "JPEG")), dtype=torch.uint8))
            assert (frame.int() - expected.int()).abs().max() <= 2
        else:
            assert torch.equal(frame, expected[:1].expand(3, -1, -1) if form == 100 else expected)


def test_only_the_frame_asked_for_is_read(tmp_path, monkeypatch):
    write_seq(tmp_path / "V.seq", [picture(index) for index in range(20)])
    video = SeqVideo(tmp_path / "V.seq")
    read, plain = [], SeqVideo._bytes
    monkeypatch.setattr(SeqVideo, "_bytes", lambda self, start, size: read.append(size) or plain(self, start, size))
    video[7]
    assert read == [len(encoded(picture(7), "JPEG"))]


def test_videos_go_to_other_processes_and_can_be_closed(tmp_path):
    write_seq(tmp_path / "V.seq", [picture(index) for index in range(2)])
    video = SeqVideo(tmp_path / "V.seq")
    first = video[0]
    assert torch.equal(pickle.loads(pickle.dumps(video))[0], first)
    video.close()
    assert torch.equal(video[0], first)
    with pytest.raises(IndexError, match="frames 0 to 1 but 2"):
        video[2]


def test_a_cut_video_is_refused_by_name_or_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "V004.seq"
    starts = write_seq(path, [picture(index) for index in range(6)])
    path.write_bytes(path.read_bytes()[: starts[4] + 100])
    with pytest.raises(ValueError, match=r"V004\.seq is damaged: its frames from 4 on, of 6, are missing .* `damaged=\"skip\"`"):
        SeqVideo(path)
    with pytest.warns(UserWarning, match=r"V004\.seq is damaged"):
        video = SeqVideo(path, damaged="skip")
    assert video.frames == (0, 1, 2, 3)
    assert video[3].shape == (3, 48, 64)
    with pytest.raises(ValueError, match=r"V004\.seq: frame 5 is damaged"):
        video[5]


@pytest.mark.parametrize("form", [100, 201])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_video_that_does_not_say_its_length_is_read_to_its_end(form, indexed, tmp_path):
    write_seq(tmp_path / "V.seq", [picture(index) for index in range(5)], form)
    if indexed:
        SeqVideo(tmp_path / "V.seq").save_index()
    content = bytearray((tmp_path / "V.seq").read_bytes())
    content[572:576] = bytes(4)
    (tmp_path / "V.seq").write_bytes(content)
    video = SeqVideo(tmp_path / "V.seq")
    assert len(video) == 5
    assert video[4].shape == (3, 48, 64)


def test_a_broken_frame_spoils_no_other(tmp_path):
    path = tmp_path / "V.seq"
    starts = write_seq(path, [picture(index) for index in range(4)])
    content = bytearray(path.read_bytes())
    content[starts[2] + 4 : starts[2] + 40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="frame 2 is no whole image"):
        SeqVideo(path)
    with pytest.warns(UserWarning, match="frame 2 is no whole image"):
        video = SeqVideo(path, damaged="skip")
    assert video.frames == (0, 1, 3)
    # Damage inside of an image shows when it is decoded.
    content[starts[1] + 24 : starts[1] + 400] = bytes(376)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="frame 2"):
        video = SeqVideo(path, damaged="skip")
    with pytest.raises(ValueError, match=r"V\.seq: frame 1 is damaged"):
        video[1]
    assert video[3].shape == (3, 48, 64)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.seq").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"a\.seq is no \.seq video"):
        SeqVideo(tmp_path / "a.seq")
    write_seq(tmp_path / "b.seq", [picture(0)])
    content = bytearray((tmp_path / "b.seq").read_bytes())
    for form, message in ((101, "Bayer mosaics"), (77, "unknown image format 77")):
        content[568:572] = struct.pack("<I", form)
        (tmp_path / "b.seq").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SeqVideo(tmp_path / "b.seq")
    write_seq(tmp_path / "c.seq", [picture(0)] * 2)
    for index in (b"rubbish", None):
        file = tmp_path / "c-seek.mat"
        savemat(file, {"seek": [[1024.0]]}) if index is None else file.write_bytes(index)
        with pytest.raises(ValueError, match=r"c-seek\.mat .*the video is enough"):
            SeqVideo(tmp_path / "c.seq")
    with pytest.raises(FileNotFoundError):
        SeqVideo(tmp_path / "d.seq")


# Annotations


@pytest.mark.parametrize("version", [1.4, 1.2, 1.1])
def test_annotations_in_matlab_s_structure_are_read(version, tmp_path):
    write_vbb(tmp_path / "V000.vbb", FRAMES, OBJECTS, version)
    check_objects(read_vbb(tmp_path / "V000.vbb"), visible=version >= 1.2)


def test_the_text_form_says_the_same(tmp_path):
    (tmp_path / "V000.txt").write_text(vbb_text(FRAMES, OBJECTS))
    check_objects(read_vbb(tmp_path / "V000.txt"))


def test_annotations_of_extracted_frames_say_the_same(tmp_path):
    frames = {}
    for name, first, boxes, parts in OBJECTS:
        for at, (box, part) in enumerate(zip(boxes, parts, strict=True)):
            row = {"lbl": name, "pos": box, "posv": part if any(part) else 0, "occl": 0}
            frames.setdefault(str(first - 1 + at), []).append(row)
    content = {"set06": {"V010": {"nFrame": FRAMES, "frames": frames}}}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    truths = read_truths(tmp_path / "annotations.json")
    assert list(truths.annotations) == [f"set06_V010_I{index:05d}" for index in range(FRAMES)]
    check_objects(list(truths.annotations.values()))


def test_a_folder_of_videos_is_read_and_every_nth_frame_taken(tmp_path):
    write_vbb(tmp_path / "annotations" / "set06" / "V000.vbb", 70, [("person", 30, [[10, 10, 20, 60]], [[0] * 4])])
    write_vbb(tmp_path / "annotations" / "set07" / "V011.vbb", 29, [])
    truths = read_truths(tmp_path)
    assert len(truths.annotations) == 99
    kept = at_interval(truths, 30).annotations
    assert list(kept) == ["set06_V000_I00029", "set06_V000_I00059"]
    np.testing.assert_array_equal(kept["set06_V000_I00029"].boxes, [[9, 9, 20, 60]])
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        at_interval(truths, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is damaged"), (b"MATLAB 5.0 MAT-file and then nothing", "is damaged"), (None, "frame 1: object 9")],
    ids=["empty", "cut", "wrong"],
)
def test_a_damaged_annotation_is_named_and_the_rest_stays_usable(content, message, tmp_path):
    good, bad = (tmp_path / "set00" / f"V00{index}.vbb" for index in range(2))
    write_vbb(good, FRAMES, OBJECTS)
    write_vbb(bad, FRAMES, OBJECTS)
    if content is None:
        lists = loadmat(bad, appendmat=False)
        lists["A"][0, 0]["objLists"][0, 0][0, 0]["id"][...] = 9
        savemat(bad, {"A": lists["A"], "vers": 1.4}, appendmat=False)
    else:
        bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"V001\.vbb.*{message}"):
        read_truths(tmp_path)
    with pytest.warns(UserWarning, match=r"V001\.vbb.*left out"):
        truths = read_truths(tmp_path, damaged="skip")
    check_objects(list(truths.annotations.values()))


def test_damaged_text_is_named(tmp_path):
    whole = vbb_text(FRAMES, OBJECTS)
    for content, message in (
        ("hello", "does not begin with"),
        (whole[: whole.index("lbl='dog'")], "3 of 4 objects"),
        (whole.replace("posv=[", "posw=[", 1), "no whole `posv="),
        (whole.replace("100.500000", "hello", 1), "rows of 4 numbers"),
        (whole.replace("str=2 end=3", "str=2 end=4"), "frames 2 to 4 but has 2 boxes"),
        (whole.replace("nFrame=5", "nFrame=2"), "frame 3 of 2"),
    ):
        (tmp_path / "V000.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_vbb(tmp_path / "V000.txt")


def test_coco_style_annotations_are_read(data_dir):
    """The real file of the newer annotations, which marks whom it ignores and counts pixels from 1."""
    path = data_dir("caltech") / "caltech" / "caltech_test_new_annotations_coco.json"
    cells = read_truths(path.with_name("gt-All-new-vlpd.mat"))
    truths = read_truths(path, from_one=True)
    assert cells.marked
    assert not truths.marked
    assert len(truths.annotations) == 4024
    assert truths.files["set06_V000_I00029"] == "set06_V000_I00029.jpg"
    # Nearly the same boxes, in the same order of images, as another group of authors has them: who counts is resized in width
    # there, and the two differ in a few tops.
    pairs = list(zip(truths.annotations.values(), cells.annotations.values(), strict=True))
    assert [len(named.boxes) for named, _ in pairs] == [len(cell.boxes) for _, cell in pairs]
    named, cell = (np.concatenate([np.sort(one.boxes[:, 1]) for one in side]) for side in zip(*pairs, strict=True))
    assert (named == cell).mean() > 0.99


def city(**changes):
    rows = [
        {"id": 1, "image_id": 5, "category_id": 1, "bbox": [10, 20, 30, 60], "vis_bbox": [10, 20, 15, 60], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 1, "bbox": [50, 20, 30, 60], "vis_ratio": 0.25, "ignore": 1},
        {"id": 3, "image_id": 5, "category_id": 2, "bbox": [90, 20, 30, 60]},
        {"id": 4, "image_id": 5, "category_id": 9, "bbox": [130, 20, 30, 60]},
    ]
    names = {1: "pedestrian", 2: "rider", 9: "car"}
    content = {
        "images": [{"id": 5, "file_name": "aachen/aachen_1.png"}, {"id": 6, "file_name": "bonn/bonn_1.png"}],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": rows,
    }
    return {**content, **changes}


def test_city_persons_style_annotations_are_read(tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(city()))
    truths = read_truths(tmp_path / "gt.json")
    found = truths.annotations["aachen_1"]
    np.testing.assert_array_equal(found.boxes[:, 0], [10, 50, 90])
    assert found.labels.tolist() == [1, 1, 4]
    assert found.ignore.tolist() == [False, True, False]
    assert (found.visible[:, 2] * found.visible[:, 3]).tolist() == [900, 450, 0]
    assert truths.annotations["bonn_1"].boxes.shape == (0, 4)
    (tmp_path / "dt.json").write_text(json.dumps([{"image_id": 6, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    detections = read_detections(tmp_path / "dt.json", truths)
    assert detections["bonn_1"].boxes.tolist() == [[1, 2, 3, 4]]
    assert len(detections["aachen_1"].scores) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"gt\.json is no JSON, or is damaged"),
        ("[]", "neither `images` and `annotations`"),
        (json.dumps(city(categories=[{"id": 1, "name": "cat"}])), "no category of persons but cat"),
        (json.dumps(city(annotations=[{"image_id": 7, "category_id": 1}])), "damaged: KeyError 7"),
        (
            json.dumps(city(annotations=[{"image_id": 5, "category_id": 1, "bbox": [1, 2]}])),
            "image 5: expected rows of 4 numbers",
        ),
        (json.dumps({"set00": {"V000": {}}}), "expected `nFrame` and `frames`"),
    ],
)
def test_damaged_json_is_named(content, message, tmp_path):
    (tmp_path / "gt.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_truths(tmp_path / "gt.json")


def test_cells_go_with_cells_or_with_names(tmp_path):
    cells = np.empty((1, 2), dtype=object)
    cells[0, 0], cells[0, 1] = np.array([[2.0, 3, 10, 20, 1]]), np.zeros((0, 5))
    for name in ("gt", "dt"):
        savemat(tmp_path / f"{name}.mat", {name: cells})
    truths = read_truths(tmp_path / "gt.mat")
    assert truths.annotations["1"].ignore.tolist() == [True]
    assert truths.annotations["1"].boxes.tolist() == [[1, 2, 10, 20]]
    assert read_detections(tmp_path / "dt.mat", truths)["1"].scores.tolist() == [1]
    named = read_truths(tmp_path / "gt.mat", frames=["a", "b"])
    assert list(named.annotations) == ["a", "b"]
    with pytest.raises(ValueError, match="2 cells without names"):
        read_detections(tmp_path / "dt.mat", named)
    with pytest.raises(ValueError, match="2 cells but there are 3 names"):
        read_truths(tmp_path / "gt.mat", frames=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"dt\.mat has no variable `gt`"):
        read_truths(tmp_path / "dt.mat")
    (tmp_path / "gt.mat").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"gt\.mat is no Matlab file"):
        read_truths(tmp_path / "gt.mat")


# Results


def test_real_results_are_read(data_dir):
    folder = data_dir("caltech") / "caltech" / "dt-NMS-Loss"
    found = read_results(folder)
    lines = [line for file in folder.glob("set*/V*.txt") for line in file.read_text().splitlines()]
    assert sum(len(one.scores) for one in found.values()) == len(lines)
    first = (folder / "set06" / "V000.txt").read_text().splitlines()[0].split(",")
    assert first[0] == "30"
    mine = found["set06_V000_I00029"]
    np.testing.assert_allclose(mine.boxes[0] + (1, 1, 0, 0), [float(number) for number in first[1:5]])
    assert mine.scores[0] == float(first[5])


def test_results_survive_being_written_and_read(tmp_path):
    generator = np.random.default_rng(0)
    names = [Frame("set06", "V000", 29).name, Frame("set06", "V000", 59).name, Frame("set10", "V011", 29).name]
    written = {name: Detections.of(generator.random((4, 5)) * 100) for name in names}
    written["set07_V003_I00029"] = Detections.of([])
    write_results(tmp_path, written)
    assert (tmp_path / "set06" / "V000.txt").read_text().startswith("30,")
    assert (tmp_path / "set07" / "V003.txt").read_text() == "", "the evaluation wants a file of every video"
    found = read_results(tmp_path)
    assert sorted(found) == sorted(names)
    for name in names:
        np.testing.assert_allclose(found[name].boxes, written[name].boxes, atol=1e-13)  # 1 is added and taken off
        np.testing.assert_array_equal(found[name].scores, written[name].scores)
    with pytest.raises(ValueError, match="names of Caltech's frames"):
        write_results(tmp_path, {"street.png": Detections.of([])})


def test_a_file_a_frame_is_read_too(tmp_path):
    (tmp_path / "set06" / "V000").mkdir(parents=True)
    (tmp_path / "set06" / "V000" / "I00029.txt").write_text("11 21 10 20 0.5\n")
    assert read_results(tmp_path)["set06_V000_I00029"].boxes.tolist() == [[10, 20, 10, 20]]


def test_damaged_results_are_named_by_line(tmp_path):
    (tmp_path / "set06").mkdir()
    (tmp_path / "set06" / "V000.txt").write_text("30,1,2,3,4,0.5\n")
    for row, message in (
        ("30,1,2,3", "line 2: expected 6 numbers"),
        ("30,1,2,3,4,x", "line 2: expected rows of 6"),
        ("0,1,2,3,4,5", "frames"),
    ):
        (tmp_path / "set06" / "V001.txt").write_text(f"30,1,2,3,4,0.5\n{row}\n")
        with pytest.raises(ValueError, match=rf"V001\.txt.*{message}"):
            read_results(tmp_path)
        with pytest.warns(UserWarning, match="V001"):
            assert list(read_results(tmp_path, damaged="skip")) == ["set06_V000_I00029"]
    with pytest.raises(ValueError, match='must be "raise" or "skip" but got \'go on\''):
        read_results(tmp_path, damaged="go on")
    with pytest.raises(FileNotFoundError, match="no files setNN"):
        read_results(tmp_path / "set06")


def test_scenes_hold_the_boxes_of_all_images():
    scenes = scenes_of(
        [Annotations.of([[1, 2, 3, 4]]), Annotations.of([])], [Detections.of([]), Detections.of([[5, 6, 7, 8, 0.5]])]
    )
    assert scenes.truth_counts.tolist() == [1, 0]
    assert scenes.detection_counts.tolist() == [0, 1]
    assert scenes_of([], []).images == 0
    with pytest.raises(ValueError, match="as the 1 boxes but got 2, 1 and 1"):
        Annotations.of([[1, 2, 3, 4]], labels=[1, 1])


# The command


def caltech_folder(folder):
    """Two videos with a pedestrian each, one of them half hidden, in all frames."""
    for video, part in (("V000", [0] * 4), ("V001", [100, 100, 20, 30])):
        write_vbb(folder / "set06" / f"{video}.vbb", 60, [("person", 1, [[100, 100, 24.6, 60]] * 60, [part] * 60)])
    return folder


def test_score_prints_a_table_and_draws(tmp_path, capsys):
    truths = caltech_folder(tmp_path / "gt")
    box = [99, 99, 24.6, 60]
    frames = [Frame("set06", video, index).name for video in ("V000", "V001") for index in (29, 59)]
    write_results(tmp_path / "good", {name: Detections.of([[*box, 1.0]]) for name in frames})
    write_results(tmp_path / "half", {name: Detections.of([[*box, 1.0]] if "29" in name else []) for name in frames})
    detectors = ["--dt", str(tmp_path / "good"), "--dt", f"ours={tmp_path / 'half'}"]
    picture_file = tmp_path / "curves.png"
    main(["score", "--gt", str(truths), *detectors, "--picture", str(picture_file)])
    printed = capsys.readouterr().out
    assert "4 images" in printed
    assert re.search(r"good\W+ours", printed)
    assert re.search(r"reasonable\W+2\W+0\.0000\W+50\.0000", printed)
    assert re.search(r"occlusion_heavy\W+2\W+0\.0000\W+50\.0000", printed)
    assert re.search(r"all\W+4\W+0\.0000\W+50\.0000", printed)
    assert re.search(r"far\W+0\W+-\W+-", printed), "nobody counts"
    assert picture_file.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "good").rename(tmp_path / "lr=0.1")
    main(["score", "--gt", str(truths), "--dt", str(tmp_path / "lr=0.1"), "--subset", "reasonable", "--every", "60"])
    printed = capsys.readouterr().out
    assert "2 images" in printed
    assert "lr=0.1" in printed


def test_score_takes_the_sets_that_there_are_results_of(tmp_path, capsys):
    truths = caltech_folder(tmp_path / "gt")
    write_vbb(truths / "set00" / "V000.vbb", 60, [("person", 1, [[100, 100, 24.6, 60]] * 60, [[0] * 4] * 60)])
    write_results(
        tmp_path / "dt", {f"set06_{video}_I000{index}": Detections.of([]) for video in ("V000", "V001") for index in (29, 59)}
    )
    main(["score", "--gt", str(truths), "--dt", str(tmp_path / "dt"), "--subset", "all"])
    printed = capsys.readouterr().out
    assert "4 images of set06 to set06" in printed
    assert re.search(r"all\W+4\W+100\.0000", printed), "nothing was detected"


def test_score_gives_the_published_figure(data_dir, capsys):
    folder = data_dir("caltech") / "caltech"
    names = ["--frames", str(folder / "caltech_test_new_annotations_coco.json")]
    original = ["score", "--gt", str(folder / "gt-Reasonable-original.mat")]
    main([*original, "--dt", f"ACF={folder / 'dt-ACF-Caltech.mat'}", "--dt", f"SDt={folder / 'dt-ACF+SDt.mat'}"])
    assert re.search(r"reasonable\W+1,014\W+44\.2191\W+37\.3410", capsys.readouterr().out)
    main([*original, *names, "--dt", f"NMS-Loss={folder / 'dt-NMS-Loss'}"])
    assert re.search(r"reasonable\W+1,014\W+5\.9179", capsys.readouterr().out)


def test_margins_are_for_images_of_caltech_s_size(tmp_path, capsys):
    (tmp_path / "gt.json").write_text(
        json.dumps(city(annotations=[{"image_id": 5, "category_id": 1, "bbox": [900, 20, 41, 100]}]))
    )
    (tmp_path / "dt.json").write_text(json.dumps([{"image_id": 5, "bbox": [900, 20, 41, 100], "score": 0.5}]))
    main(["score", "--gt", str(tmp_path / "gt.json"), "--dt", str(tmp_path / "dt.json"), "--subset", "reasonable"])
    assert re.search(r"reasonable\W+1\W+0\.0000", capsys.readouterr().out)


def test_score_says_what_is_wrong(tmp_path, capsys):
    truths = caltech_folder(tmp_path / "gt")
    write_results(tmp_path / "dt", {"set09_V000_I00029": Detections.of([[1, 2, 3, 4, 5]])})
    for arguments, message in (
        (["--dt", str(tmp_path / "dt")], "None of the 1 images with detections is one of the 0 annotated"),
        (["--dt", str(tmp_path / "dt")] * 2, "Two detectors are called dt"),
        (["--dt", str(tmp_path / "none")], "There is no"),
    ):
        with pytest.raises(SystemExit) as status:
            main(["score", "--gt", str(truths), *arguments])
        assert status.value.code == 1
        assert message in capsys.readouterr().err
    (truths / "set06" / "V000.vbb").write_bytes(b"rubbish")
    write_results(tmp_path / "dt", {"set06_V001_I00029": Detections.of([[99, 99, 24.6, 60, 5]])})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["score", "--gt", str(truths), "--dt", str(tmp_path / "dt"), "--skip-damaged", "--subset", "occlusion_heavy"])
    assert any("V000.vbb" in str(one.message) for one in caught)
    assert re.search(r"occlusion_heavy\W+2\W+50\.0000", capsys.readouterr().out)


def test_results_by_the_name_of_images_are_read_as_they_were_written(tmp_path):
    found = {"a photo": Detections.of([[1.5, 2, 3, 4, 0.25]]), "none": Detections.of([])}
    write_results(tmp_path / "boxes.json", found)
    again = read_results(tmp_path / "boxes.json")
    assert again.keys() == found.keys()
    assert again["a photo"].boxes.tolist() == [[1.5, 2.0, 3.0, 4.0]]
    assert again["a photo"].scores.tolist() == [0.25]
    assert again["none"].boxes.shape == (0, 4)
    truths = Truths(annotations={name: Annotations.of([[1, 2, 3, 4]]) for name in found}, files={}, ids={})
    assert read_detections(tmp_path / "boxes.json", truths).keys() == found.keys()
    with pytest.raises(ValueError, match=r"boxes.json: 1 images have no annotations; the first is 'none'"):
        read_detections(tmp_path / "boxes.json", replace(truths, annotations={"a photo": Annotations.of([])}))
    (tmp_path / "boxes.json").write_text('{"a": [[1, 2, 3]]}')
    with pytest.raises(ValueError, match=r"boxes.json, image 'a': expected rows of 5 numbers"):
        read_results(tmp_path / "boxes.json")
    (tmp_path / "boxes.json").write_text("[1]")
    with pytest.raises(ValueError, match="no detections by the name"):
        read_results(tmp_path / "boxes.json")
