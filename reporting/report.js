"use strict";

const OTHER = { en: "zh-CN", "zh-CN": "en" };
const button = document.getElementById("language");

function show(language) {
  document.documentElement.lang = language;
  document.title = document.querySelector("h1").innerText;
}

button.addEventListener("click", () => show(OTHER[document.documentElement.lang]));
button.hidden = false;
show(navigator.language.toLowerCase().startsWith("zh") ? "zh-CN" : "en");
