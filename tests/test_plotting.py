from __future__ import annotations

import csv
import json
import math
import os

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from slope import cli, plotting
from slope.plotting import curves, masks, runs

COLUMNS = [
    *("step", "tokens", "epoch", "seconds", "train/loss", "train/perplexity", "val/loss"),
    *("val/perplexity", "lr", "lora_lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"),
    "adapters_active",
]


def write_run(folder, steps=40, adapters_from=30, summary=None):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for step in range(1, steps + 1):
            loss = 4 + 4 * math.exp(-step / 10)
            row = {"step": step, "tokens": step * 512, "train/loss": loss, "lr": 1e-3 / step}
            row |= {"grad_norm": 1.0, "tokens_per_second": 5000.0, "peak_memory_bytes": 3 << 30}
            row["adapters_active"] = step >= adapters_from
            if step >= adapters_from:
                row["lora_lr"] = 1e-4
            writer.writerow(row)
            if step % 10 == 0:
                writer.writerow({"step": step, "val/loss": loss + 0.1})
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def drawn(*folders, picture=curves, against="steps"):
    """The figure of runs, to look at its lines: their curves, or their masks."""
    return picture.draw(runs.read_runs(folders), against)


def curve(axis, number=0):
    """Places, rounded, and values of a line."""
    line = axis.get_lines()[number]
    return [round(float(x), 6) for x in line.get_xdata()], list(line.get_ydata())


def rendered(figure):
    """The figure, with all its texts where they stand in the picture."""
    FigureCanvasAgg(figure).draw()
    return figure


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_a_run_becomes_a_png_and_an_svg(tmp_path):
    folder = write_run(tmp_path / "run", summary={"val_loss": 4.2, "tokens": 20480})
    png, svg = plotting.plot_run(folder)
    assert (png, svg) == (folder / "curves.png", folder / "curves.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_the_bigram_level_and_the_adapters_start_are_drawn(tmp_path):
    summary = {"bigram_val_loss": 5.12, "adapters_started_at_step": 31, "val_loss": 4.2}
    figure = drawn(write_run(tmp_path, summary=summary))
    loss = figure.axes[0]
    assert labels(loss) == [
        "training (smoothed)",
        "validation",
        "bigram, validation (5.12)",
        "adapters start",
    ]
    for axis in figure.axes:
        assert any(
            line.get_linestyle() == "--" and list(line.get_xdata()) == [31, 31]
            for line in axis.get_lines()
        )
        assert axis.get_ylabel() and axis.get_title()


def test_without_a_summary_the_adapters_start_is_read_from_the_metrics(tmp_path):
    figure = drawn(write_run(tmp_path, adapters_from=17))
    assert any(
        line.get_linestyle() == "--" and list(line.get_xdata()) == [17, 17]
        for line in figure.axes[0].get_lines()
    )


def test_a_resumed_run_is_not_titled_with_what_it_came_to_before(tmp_path):
    summary = {"val_loss": 5.814, "tokens": 5120, "adapters_started_at_step": 17}
    titles = {}
    for steps in (39, 40, 45):  # the last row is of step 40
        folder = write_run(tmp_path / "run", summary=summary | {"steps": steps})
        figure = drawn(folder)
        titles[steps] = figure.get_suptitle()
        start = 30 if steps < 40 else 17
        assert any([start, start] == list(line.get_xdata()) for line in figure.axes[0].lines)
    assert titles[39] == "run"
    assert titles[40].endswith("validation loss 5.814, perplexity 335.0, after 5,120 tokens")
    assert titles[45] == titles[40]


def test_a_dense_run_has_neither_bigram_nor_adapters(tmp_path):
    summary = {"adapters_started_at_step": None}
    folder = write_run(tmp_path, adapters_from=1000, summary=summary)
    figure = drawn(folder)
    assert labels(figure.axes[0]) == ["training (smoothed)", "validation"]
    assert labels(figure.axes[2]) == ["weights"]


def test_columns_that_were_not_measured_say_so(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,5.0\n2,4.0\n")
    figure = drawn(tmp_path)
    assert [axis.texts[0].get_text() for axis in figure.axes[3:]] == ["not measured"] * 3


def test_a_loss_that_is_not_finite_does_not_stop_the_picture(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,5.0\n2,nan\n3,inf\n")
    assert all(path.is_file() for path in plotting.plot_run(tmp_path))


def test_smoothing_keeps_a_straight_line_straight():
    line = [2.0 * i for i in range(200)]
    assert runs.smooth(line)[3:-3] == pytest.approx(line[3:-3])


@pytest.mark.parametrize("steps", [21, 200, 1000])
def test_smoothing_ends_in_a_mean_and_not_in_a_single_loss(steps):
    smoothed = runs.smooth([6.0] + [4.0] * (steps - 2) + [3.0])
    half = max(1, steps // 60)
    assert smoothed[0] == pytest.approx(4.0 + 2.0 / (half + 1))
    assert smoothed[-1] == pytest.approx(4.0 - 1.0 / (half + 1))
    assert smoothed[half + 1 : -half - 1] == [4.0] * (steps - 2 * half - 2)


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_one_row_is_seen_at_a_whole_step(tmp_path, count):
    folders = [write_run(tmp_path / f"{i}", steps=1, adapters_from=1) for i in range(count)]
    for folder in folders:
        with (folder / "metrics.csv").open("a") as file:
            file.write("2,1024,,,nan,nan\n")  # diverged
        write_masks(folder, steps=(1,))
    for picture in (curves, masks):
        figure = drawn(*folders, picture=picture)
        for axis in rendered(figure).axes:
            lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
            assert lines and all(line.get_marker() not in ("None", None) for line in lines)
            assert not axis.texts
            low, high = axis.get_xlim()
            assert {tick for tick in axis.get_xticks() if low <= tick <= high} <= {0, 1, 2}
            assert low <= 1 <= high and 1 in axis.get_xticks()


def test_the_fractions_of_a_step_are_no_ticks_and_those_of_other_units_are(tmp_path):
    text = "step,tokens,seconds,train/loss\n1,1000000,0.5,5.0\n2,1500000,1.0,4.0\n"
    (tmp_path / "metrics.csv").write_text(text)
    for against, whole in (("steps", True), ("tokens", False), ("time", False)):
        ticks = drawn(tmp_path, against=against).axes[0].get_xticks()
        assert all(float(tick).is_integer() for tick in ticks) == whole


def test_a_folder_without_metrics_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*logs/<name>"):
        plotting.plot_run(tmp_path)


def test_metrics_without_a_step_and_a_broken_summary_are_errors(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n")
    with pytest.raises(ValueError, match="holds no measured step yet"):
        plotting.plot_run(tmp_path)
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json' is not valid JSON"):
        plotting.plot_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "missing"),
    [
        ("metrics.csv", "a,b\n1,2\n", "no column step and no train/loss; give the folder of a run"),
        ("metrics.csv", "", "no column step and no train/loss"),
        ("metrics.csv", "step,lr\n1,2\n", "no column train/loss"),
        ("diagnostics.csv", "step,density\n1,0.5\n", "no column layer"),
    ],
)
def test_a_table_of_something_else_is_told_by_the_column_that_it_lacks(
    tmp_path, name, text, missing
):
    write_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}' is not the .* file of a run: it has {missing}"):
        plotting.plot_run(tmp_path)


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_run_that_is_misspelled_is_suggested_and_the_newest_are_listed(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        path = write_run(tmp_path / "logs" / f"run-{number}", steps=1) / "metrics.csv"
        os.utime(path, (number, number))
    assert cli.main([command, "rnu-0"]) == 1
    said = capsys.readouterr().err
    assert "; runs under logs/: run-11, run-10, run-9, " in said
    assert said.endswith(", run-2 and 2 older ones; did you mean 'run-0'?\n")
    assert cli.main([command, "zebra"]) == 1
    assert capsys.readouterr().err.endswith(", run-2 and 2 older ones.\n")


@pytest.mark.parametrize("name", ["metrics.csv", "diagnostics.csv"])
def test_a_table_that_is_no_text_is_named_with_what_to_do(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).write_bytes("step,layer\n1,x\n".encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{name}' is no table in UTF-8 .*; restore it .* iconv"):
        plotting.plot_run(tmp_path)


def test_the_title_of_a_long_name_is_inside_the_picture(tmp_path):
    folder = write_run(tmp_path / ("long-" * 40), summary={"val_loss": 4.2, "tokens": 2e11})
    write_masks(folder)
    for picture in (curves, masks):
        figure = rendered(drawn(folder, picture=picture))
        (title,) = [text for text in figure.texts if "200.0 billion tokens" in text.get_text()]
        assert title.get_text().replace("\n", "").startswith("long-" * 40)
        extent = title.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1


# -- the masks -------------------------------------------------------------------------------------

MASK_COLUMNS = [
    *("step", "layer", "density", "density_backward", "imposed_sparsity", "lemma", "flip_rate"),
    *("column_flip_rate", "kept_energy", "kept_energy_backward", "adapter_norm"),
]


def write_masks(folder, steps=(10, 20, 30, 40), **changes):
    values = {"density": 0.5, "density_backward": 0.41, "lemma": 0.09375, "flip_rate": 0.01}
    values |= {"column_flip_rate": 0.02, "kept_energy": 0.9, "kept_energy_backward": 0.95}
    values |= {"adapter_norm": 0.1} | changes
    with (folder / "diagnostics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, MASK_COLUMNS)
        writer.writeheader()
        for step in steps:
            for layer in ("h.0.c_fc", "h.1.c_fc", "total"):
                writer.writerow({"step": step, "layer": layer} | values)


def widths(axis):
    return sorted(round(line.get_linewidth(), 1) for line in axis.get_lines())


def test_masks_get_a_picture_of_their_own(tmp_path):
    summary = {"adapters_started_at_step": 31, "val_loss": 4.2, "tokens": 20480}
    folder = write_run(tmp_path, summary=summary)
    assert drawn(folder, picture=masks) is None
    write_masks(folder)
    plotting.plot_run(folder)
    figure = drawn(folder, picture=masks)
    assert (folder / plotting.DIAGNOSTICS).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "diagnostics.svg").read_text()
    assert "perplexity 66.7, after 20,480 tokens" in figure.get_suptitle()
    density, flips, energy, adapter = figure.axes
    # Each layer thin, the total bold; the adapters' start with its legend, the lemma.
    assert widths(density) == [0.7] * 4 + [1.0, 1.0, 1.6] + [2.2] * 2
    assert labels(density) == [
        "forward", "input gradient", "input gradient by Lemma 2.1 (40.62 %)", "adapters start"
    ]  # fmt: skip
    assert labels(flips) == ["forward", "input gradient"]
    assert labels(energy) == ["forward, of the dense weight", "input gradient, of the forward's"]
    assert widths(adapter) == [0.7] * 2 + [1.0, 2.2]
    for axis in figure.axes:
        assert axis.get_title() and axis.get_ylabel()
        assert any(list(line.get_xdata()) == [31, 31] for line in axis.get_lines())


def test_mask_columns_that_were_not_measured_say_so(tmp_path):
    folder = write_run(tmp_path)
    write_masks(folder, lemma="", kept_energy="", kept_energy_backward="", adapter_norm="")
    figure = drawn(folder, picture=masks)
    assert labels(figure.axes[0])[:2] == ["forward", "input gradient"]
    assert not any("Lemma" in label for label in labels(figure.axes[0]))
    assert [axis.texts[0].get_text() for axis in figure.axes[2:]] == ["not measured"] * 2
    write_masks(folder, density_backward=0.5, lemma=0.0)  # an exact input gradient
    figure = drawn(folder, picture=masks)
    assert not any("Lemma" in label for label in labels(figure.axes[0]))


def test_a_single_measurement_and_none_do_not_stop_the_picture(tmp_path):
    folder = write_run(tmp_path)
    write_masks(folder, steps=(), density=1.0)
    assert drawn(folder, picture=masks) is None
    write_masks(folder, steps=(10,), kept_energy="nan")
    drawn(folder, picture=masks).savefig(folder / "x.svg")


def test_a_single_measurement_of_several_runs_tells_forward_from_backward(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        write_masks(folder, steps=(40,))
    figure = drawn(*folders, picture=masks)
    dots = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, True] * 2
    assert figure.axes[0].get_xlim()[0] == 0
    shown = {text.get_text(): handle for text, handle in zip(
        figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True
    )}  # fmt: skip
    assert shown["input gradient"].get_markerfacecolor() == "white"
    assert shown["forward"].get_markerfacecolor() != "white"


# -- against tokens and time, and several runs -----------------------------------------------------


@pytest.mark.parametrize(
    ("against", "label", "places", "start"),
    [
        ("steps", "optimizer steps", [10, 20, 30], 25),
        ("tokens", "tokens (millions)", [1, 2, 4], 3),
        ("time", "wall-clock time (minutes)", [1, 2, 6], 2),
    ],
)
def test_the_horizontal_axis_is_steps_tokens_or_time(tmp_path, against, label, places, start):
    (tmp_path / "metrics.csv").write_text(
        "step,tokens,seconds,train/loss,val/loss\n"
        "10,1e6,60,5,\n20,2e6,120,4,\n30,4e6,360,3,\n20,,,,6\n"
    )
    # Between the rows; in time, the one before.
    (tmp_path / "summary.json").write_text('{"adapters_started_at_step": 25}')
    write_masks(tmp_path, steps=(20, 25))
    for picture in (curves, masks):
        figure = drawn(tmp_path, picture=picture, against=against)
        assert [axis.get_xlabel() for axis in figure.axes[-2:]] == [label] * 2
        assert all(
            [start, start] in [list(a.get_xdata()) for a in axis.lines] for axis in figure.axes
        )
        if picture is curves:
            assert [curve(figure.axes[0], i)[0] for i in (0, 1)] == [places, places[1:2]]
        else:
            between = sum(places[1:]) / 2
            assert curve(figure.axes[0])[0] == [places[1], between]


@pytest.mark.parametrize(
    ("against", "steps", "tokens", "label"),
    [
        ("tokens", 99, 1000, "tokens"),
        ("tokens", 150, 2048, "tokens (thousands)"),
        ("tokens", 400, 2048, "tokens (thousands)"),
        ("steps", 99_999, 1, "optimizer steps"),
        ("steps", 400_000, 1, "optimizer steps (thousands)"),
        ("steps", 1_000_000, 1, "optimizer steps (thousands)"),
    ],
)
def test_the_numbers_of_the_horizontal_axis_do_not_touch(tmp_path, against, steps, tokens, label):
    rows = [f"{round(i * steps / 50)},{round(i * steps / 50) * tokens},4.0" for i in range(1, 51)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,tokens,train/loss", *rows]))
    figure = rendered(drawn(tmp_path, against=against))
    for axis in figure.axes[3:]:
        assert axis.get_xlabel() == label
        low, high = axis.get_xlim()
        ticks = [t for t in axis.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        places = [tick.label1.get_window_extent() for tick in ticks]
        assert len(places) > 2
        assert all(a.x1 + 8 < b.x0 for a, b in zip(places, places[1:], strict=False))


@pytest.mark.parametrize("summed_up", [True, False])
@pytest.mark.parametrize("began", [1, 31, 39])
def test_the_adapters_start_comes_before_the_step_that_compiles_anew(tmp_path, began, summed_up):
    # A step takes one second, and the one after `began` steps, the first with adapters, 60 more.
    rows = ["step,seconds,train/loss,adapters_active"]
    for step in (1, 10, 20, 30, 40, 50):
        active = step > began
        rows.append(f"{step},{step + 60 * active},4.0,{int(active)}")
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    if summed_up:
        (tmp_path / "summary.json").write_text(f'{{"adapters_started_at_step": {began}}}')
    (run,) = runs.read_runs([tmp_path])
    horizontal = runs.Horizontal("time", [run])
    assert horizontal.label == "wall-clock time (minutes)"
    assert horizontal.start(run) == pytest.approx({1: 1, 31: 30, 39: 30}[began] / 60)


def test_adapters_that_were_awake_from_the_first_step_start_at_zero(tmp_path):
    text = "step,seconds,train/loss,adapters_active\n1,60,4.0,1\n2,61,4.0,1\n"
    (tmp_path / "metrics.csv").write_text(text)
    (run,) = runs.read_runs([tmp_path])
    assert runs.Horizontal("time", [run]).start(run) == 0


def test_several_runs_lie_over_each_other_each_in_its_colour(tmp_path):
    folders = [
        write_run(tmp_path / "dense" / "seed0", adapters_from=99, summary={"val_loss": 4.2}),
        write_run(tmp_path / "sparse" / "seed0", adapters_from=17),
    ]
    write_masks(folders[1])
    figure = drawn(*folders)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "dense/seed0  –  validation loss 4.200, perplexity 66.7"
    assert texts[1:4] == ["sparse/seed0", "training", "validation"]
    assert texts[4:] == ["learning rate of the adapters", "adapters start"]
    for axis in figure.axes:
        colours = {line.get_color() for line in axis.get_lines()}
        assert len(colours) == 2 and axis.get_title() and axis.get_ylabel()
        markers = {line.get_marker() for line in axis.get_lines()} - {"None"}
        assert markers == {"o", "s"}  # told apart without colours
    top = figure.axes[0].get_ylim()[1]
    assert curve(figure.axes[0])[1][0] > top > 4.5  # the steep beginning is left out


@pytest.mark.parametrize("length", [1, 38, 160])
def test_the_legend_of_many_runs_is_inside_the_picture(tmp_path, length):
    names = [f"{i:02}-{'name-' * 40}"[:length] + f"-{i:02}" for i in range(10)]
    summary = {"val_loss": 4.2, "tokens": 20480, "adapters_started_at_step": 31}
    folders = [write_run(tmp_path / name, summary=summary) for name in names]
    for folder in folders:
        write_masks(folder)
    for picture in (curves, masks):
        figure = rendered(drawn(*folders, picture=picture))
        (legend,) = figure.legends
        texts = [text.get_text().replace("\n", "") for text in legend.get_texts()]
        assert all(text.startswith(name) for text, name in zip(texts, names, strict=False))
        extent = legend.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1
        assert 0 <= extent.y0 < extent.y1 < figure.axes[-1].get_window_extent().y0
        assert all(axis.get_window_extent().height > 200 for axis in figure.axes)


def test_twenty_runs_are_told_apart_in_every_panel(tmp_path):
    folders = [write_run(tmp_path / f"{i}") for i in range(20)]
    figure = drawn(*folders)
    for axis in figure.axes:
        lines = [line for line in axis.get_lines() if line.get_marker() not in ("None", None)]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20
    losses = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "-"]
    hollow = [line.get_markerfacecolor() == "white" for line in losses]
    assert hollow == [True, False] * 20  # training, validation


def test_masks_of_several_runs_are_their_totals(tmp_path):
    folders = [write_run(tmp_path / name, adapters_from=99) for name in ("a", "b", "dense")]
    write_masks(folders[0])
    write_masks(folders[1], density=0.25)
    figure = drawn(*folders, picture=masks)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a", "b", "forward", "input gradient"]
    densities = [curve(figure.axes[0], i)[1][0] for i in range(len(figure.axes[0].get_lines()))]
    assert densities == [0.5, 0.41, 0.25, 0.41]


def test_pictures_are_replaced_only_when_told_so(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    write_masks(folders[1])
    output = tmp_path / "new" / "x.svg"
    with pytest.raises(FileNotFoundError, match=r"no folder '.*new' for --output .*x\.svg; make"):
        plotting.plot_runs(folders, output)
    output.parent.mkdir()
    output.write_text("precious")
    with pytest.raises(FileExistsError, match=r"x\.svg' exists; give --force"):
        plotting.plot_runs(folders, output)
    assert [path.read_text() for path in output.parent.iterdir()] == ["precious"]
    written = plotting.plot_runs(folders, output, force=True)
    assert [path.name for path in written] == ["x.png", "x.svg", "x-masks.png", "x-masks.svg"]
    assert sorted(output.parent.iterdir()) == sorted(written)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("a", "a"), {}, r"run '.*a' is named twice"),
        (("a",), {"output": "x.pdf"}, r"'x\.pdf' must end in \.png or \.svg"),
        (("a",), {"against": "epochs"}, r"'epochs' is unknown; choose from steps, tokens, time"),
        (("a",), {"against": "time"}, r"no column seconds; draw it against steps"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, names, options, message):
    write_run(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        plotting.plot_runs(
            [tmp_path / name for name in names], **{"output": tmp_path / "x.png", **options}
        )
    assert not list(tmp_path.glob("x*"))
