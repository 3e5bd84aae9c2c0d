// What HTML alone can't do: keys of the page of data, and videos that play together.
window.univigu = (() => {
  const clips = () => [...document.querySelectorAll("figure[data-clip]")];
  let current = ""; // the id of the clip that the keys are about; it survives a page that is shown again

  const field = (name) => document.querySelector(`#${name} textarea, #${name} input, button#${name}, #${name} button`);

  function focus(name) {
    field(name)?.focus();
  }

  function choose(clip) {
    if (!clip) return;
    current = clip.dataset.clip;
    clip.focus({ preventScroll: true });
    clip.scrollIntoView({ block: "nearest" });
  }

  function step(by) {
    const all = clips();
    const at = all.findIndex((clip) => clip.dataset.clip === current);
    choose(all[at < 0 ? 0 : Math.min(Math.max(at + by, 0), all.length - 1)]);
  }

  function toggle(clip) {
    for (const video of clip.querySelectorAll("video")) video.paused ? video.play() : video.pause();
  }

  // Write into a field, as a person would, and press a button once Gradio has taken the value over.
  function write(name, value, button) {
    const input = field(name);
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    setTimeout(() => field(button).click(), 50);
  }

  // A clip's card also has a button about the clip that is beside it (`of`).
  function edit(what, clip, of) {
    choose(clip);
    write("edit-clip", of ?? current, `edit-${what}`);
  }

  function look(word) {
    for (const other of document.querySelectorAll(".uv-asked")) other.classList.remove("uv-asked");
    word.classList.add("uv-asked");
    write("look-at", word.dataset.look, "look");
  }

  document.addEventListener("focusin", (event) => {
    current = event.target.closest?.("figure[data-clip]")?.dataset.clip ?? current;
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-edit]");
    if (button) edit(button.dataset.edit, button.closest("figure"), button.dataset.of);
    const word = event.target.closest?.("button[data-look]");
    if (word) look(word);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !clips().length) return;
    if (event.target.closest("input, textarea, select, button, a, summary, video, [contenteditable]")) return;
    const clip = clips().find((one) => one.dataset.clip === current);
    const actions = { j: () => step(1), k: () => step(-1) };
    if (clip) {
      actions[" "] = () => toggle(clip);
      for (const [key, what] of [["e", "open"], ["x", "exclude"], ["u", "undo"]]) actions[key] = () => edit(what, clip);
    }
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });

  // Videos in a .uv-sync group do what one of them is told to do. These events don't bubble, so they are captured.
  const others = (event) => [...(event.target.closest?.(".uv-sync")?.querySelectorAll("video") ?? [])]
    .filter((video) => video !== event.target);
  const align = (event) => {
    for (const video of others(event))
      if (Math.abs(video.currentTime - event.target.currentTime) > 0.1) video.currentTime = event.target.currentTime;
  };
  document.addEventListener("play", (event) => {
    align(event);
    for (const video of others(event)) if (video.paused) video.play();
  }, true);
  document.addEventListener("pause", (event) => {
    for (const video of others(event)) if (!video.paused) video.pause();
    align(event);
  }, true);
  document.addEventListener("seeked", align, true);

  return { focus };
})();
