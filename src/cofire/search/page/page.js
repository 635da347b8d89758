// Copies the code. Without a script the page only lacks this button.
"use strict";
(() => {
  const button = document.querySelector(".copy");
  const code = document.getElementById("code");
  if (!button || !code || !navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
})();
